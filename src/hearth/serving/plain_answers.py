"""The answers of ``/generate`` and ``/chat``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hearth.serving.answers import Choice, Delta, Heading, Usage


class PlainDialect:
    """``/generate`` and ``/chat``: text, finish_reason, model and usage in one flat object."""

    def __init__(self, heading: Heading) -> None:
        self._heading = heading

    def start(self, num_choices: int) -> Iterator[dict[str, Any]]:  # noqa: ARG002 - part of the protocol
        """Nothing comes before the first token."""
        return iter(())

    def delta(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The new text; ``finish_reason`` is there in the last event of a choice."""
        event: dict[str, Any] = {"text": delta.text}
        if delta.choice:
            event["index"] = delta.choice
        if delta.finish_reason:
            event["finish_reason"] = delta.finish_reason
        yield event

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last event: which model answered, and the counts."""
        return {"model": self._heading.model, "usage": usage.render()}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer; with ``n`` above 1, ``choices`` holds all of them and ``text`` the first."""
        answer: dict[str, Any] = {
            "id": self._heading.id,
            "model": self._heading.model,
            "text": choices[0].text,
            "finish_reason": choices[0].finish_reason,
            "usage": usage.render(),
        }
        if len(choices) > 1:
            answer["choices"] = [
                {"text": choice.text, "finish_reason": choice.finish_reason} for choice in choices
            ]
        return answer
