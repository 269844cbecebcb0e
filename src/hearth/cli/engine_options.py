"""The options of verbs that run an engine in their own process; they mean what they do in `hearth serve`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
    click.option("--device", help="auto, cpu, cuda:0 ...  [default: auto]"),
    click.option("--max-model-len", type=int, help="Prompt and answer together, in tokens."),
    click.option("--weights", help="auto (as stored), int8 or int4.  [default: auto]"),
    click.option("--kv-dtype", help="auto, int8 (CPU) or fp8 (GPU).  [default: auto]"),
    click.option("--speculation", help="ngram, or a draft model with the same tokens."),
    click.option("--num-threads", type=int, help="CPU threads.  [default: one a core]"),
)
_NAMES = ("dtype", "device", "max_model_len", "weights", "kv_dtype", "speculation", "num_threads")


def engine_options(command: Command) -> Command:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_engine_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take those that were given out of ``options``; raises ConfigError for a value that is not allowed."""
    from hearth.engine.config import EngineConfig

    taken = {name: options.pop(name) for name in _NAMES}
    given = {name: value for name, value in taken.items() if value is not None}
    EngineConfig.of(**given)  # refused before torch is imported
    return given
