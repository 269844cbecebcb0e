"""Inference: requests, block pool, scheduler, plan, runner, attention, sampling, and the process of its own.

The public names load on first use, so that describing a request (`SamplingParams`) costs no torch import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hearth.engine.client import AsyncEngine
    from hearth.engine.config import EngineConfig
    from hearth.engine.llm import Engine
    from hearth.engine.outputs import Completion, Embedding, EngineStats, RequestOutput, TokenLogprob
    from hearth.engine.params import Guided, SamplingParams

_HOMES = {
    "AsyncEngine": "hearth.engine.client",
    "Completion": "hearth.engine.outputs",
    "Embedding": "hearth.engine.outputs",
    "Engine": "hearth.engine.llm",
    "EngineConfig": "hearth.engine.config",
    "EngineStats": "hearth.engine.outputs",
    "Guided": "hearth.engine.params",
    "RequestOutput": "hearth.engine.outputs",
    "SamplingParams": "hearth.engine.params",
    "TokenLogprob": "hearth.engine.outputs",
}

__all__ = [
    "AsyncEngine",
    "Completion",
    "Embedding",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Guided",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
