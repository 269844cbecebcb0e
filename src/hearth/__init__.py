"""Hearth: a language model from raw text to a monitored endpoint, and back.

The public names are loaded on first use, so that ``import hearth`` stays light and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hearth.version import __version__

if TYPE_CHECKING:
    from hearth.config import Recipe as Recipe
    from hearth.data import Dataset as Dataset
    from hearth.engine import AsyncEngine as AsyncEngine
    from hearth.engine import Completion as Completion
    from hearth.engine import Engine as Engine
    from hearth.engine import SamplingParams as SamplingParams
    from hearth.errors import HearthError as HearthError
    from hearth.training import Trainer as Trainer
    from hearth.workspace import Workspace as Workspace

_HOMES = {
    "AsyncEngine": "hearth.engine",
    "Completion": "hearth.engine",
    "Dataset": "hearth.data",
    "Engine": "hearth.engine",
    "HearthError": "hearth.errors",
    "Recipe": "hearth.config",
    "SamplingParams": "hearth.engine",
    "Trainer": "hearth.training",
    "Workspace": "hearth.workspace",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'hearth' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
