"""What a worker settles when its engine has loaded: formats of answers, and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hearth.engine.parsing import Style, detect_style
from hearth.errors import ConfigError, HearthError
from hearth.serving.worker.adapters import AdapterEngine, name_problem
from hearth.serving.worker.prompts import template_text
from hearth.telemetry import logs

log = logs.get_logger("worker")


def style_of(tokenizer: Any, tools: str, reasoning: str) -> Style:
    """The formats by name; "auto" is what the chat template speaks of, "none" none. Raises ConfigError."""
    found = detect_style(template_text(tokenizer))
    return Style(
        tools=found.tools if tools == "auto" else None if tools == "none" else tools,
        reasoning=found.reasoning if reasoning == "auto" else None if reasoning == "none" else reasoning,
    )


async def load_adapters(
    engine: AdapterEngine, given: Sequence[str], model_names: Sequence[str]
) -> dict[str, str]:
    """Load adapters given as NAME=PATH, or NAME?=PATH for those that the server can do without.

    Raises ConfigError or what the engine raises for one that cannot be loaded; the second kind is logged.
    """
    loaded: dict[str, str] = {}
    for each in given:
        name, separator, path = each.partition("=")
        optional, name = name.endswith("?"), name.removesuffix("?")
        if not separator or not path:
            raise ConfigError(f"adapter {each!r} has no path", fix="give NAME=PATH")
        problem = name_problem(name, {*model_names, *loaded})
        if problem is not None:
            raise ConfigError(f"adapter {each!r}", fix=problem)
        try:
            await engine.load_adapter(name, path)
        except HearthError as error:
            if not optional:
                raise
            log.warning("adapter lost", extra=logs.fields(adapter=name, reason=error.message))
        else:
            loaded[name] = path
    return loaded
