"""Typed recipes and settings, loaded in layers with provenance."""

from hearth.config.recipe import Recipe

__all__ = ["Recipe"]
