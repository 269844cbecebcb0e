"""Helpers of the engine's tests."""

from __future__ import annotations
