"""Reasoning before the answer, between two markers."""

from __future__ import annotations

from dataclasses import dataclass

from hearth.engine.parsing.source import Reading, Source


@dataclass(frozen=True)
class ReasoningFormat:
    """One format; the end marker, written so, is in the chat templates of models that reason so."""

    name: str
    start: str
    end: str


def read_reasoning(source: Source, reasoning: ReasoningFormat, *, opened: bool) -> Reading[None]:
    """The reasoning, if the text begins with one. ``opened``: the prompt has written the start marker.

    Only the first pair of markers counts; later ones are text.
    """
    yield from source.skip_space()
    begun = yield from source.accept(reasoning.start)
    if not begun and not opened:
        return
    yield from source.skip_space()
    source.release("markup")
    if (yield from source.text("reasoning", (reasoning.end,))) is not None:
        yield from source.skip_space()
        source.release("markup")


_FORMATS = (
    ReasoningFormat("think", "<think>", "</think>"),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
)
REASONING_FORMATS = {each.name: each for each in _FORMATS}
