"""Typed recipes and settings, loaded in layers with provenance."""

from hearth.config.loading import (
    Loaded,
    LoadedRecipe,
    Source,
    json_schema,
    list_presets,
    load_recipe,
    load_settings,
    recipe_hash,
    to_dict,
    to_yaml,
)
from hearth.config.recipe import Recipe
from hearth.config.serving import ServeConfig, ServedModel

__all__ = [
    "Recipe",
    "ServeConfig",
    "ServedModel",
    "load_recipe",
    "load_settings",
    "Loaded",
    "LoadedRecipe",
    "Source",
    "recipe_hash",
    "to_dict",
    "to_yaml",
    "json_schema",
    "list_presets",
]
