"""The answers of ``/generate`` and ``/chat``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hearth.engine.parsing import Parsed, Parser
from hearth.serving.answers import Choice, Delta, Heading, Usage


class PlainDialect:
    """``/generate`` and ``/chat``: text, finish_reason, model and usage in one flat object."""

    def __init__(self, heading: Heading, make_parser: Callable[[], Parser] | None = None) -> None:
        """``make_parser``: finds the reasoning in an answer, which is then told as ``reasoning``."""
        self._heading = heading
        self._make_parser = make_parser
        self._parsers: dict[int, Parser] = {}

    def start(self, num_choices: int) -> Iterator[dict[str, Any]]:  # noqa: ARG002 - part of the protocol
        """Nothing comes before the first token."""
        return iter(())

    def delta(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The new text or reasoning; ``finish_reason`` is there in the last event of a choice."""
        parts = [{"text": delta.text}]
        if self._make_parser is not None:
            parser = self._parsers.setdefault(delta.choice, self._make_parser())
            events = parser.feed(delta.text)
            if delta.finish_reason:
                events += parser.finish()
            found = _rendered(Parsed().add(events))
            # Reasoning first, as it was said; what holds back its text for now is no event.
            parts = [{name: text} for name, text in sorted(found.items()) if text]
            if not parts and delta.finish_reason:
                parts = [{"text": ""}]
        for number, part in enumerate(parts, start=1):
            event: dict[str, Any] = dict(part)
            if delta.choice:
                event["index"] = delta.choice
            if delta.finish_reason and number == len(parts):
                event["finish_reason"] = delta.finish_reason
            yield event

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The last event: which model answered, and the counts."""
        return {"model": self._heading.model, "usage": usage.render()}

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The answer; with ``n`` above 1, ``choices`` holds all of them and ``text`` the first."""
        texts = [{**self._read(choice.text), "finish_reason": choice.finish_reason} for choice in choices]
        answer: dict[str, Any] = {
            "id": self._heading.id,
            "model": self._heading.model,
            **texts[0],
            "usage": usage.render(),
        }
        if len(choices) > 1:
            answer["choices"] = texts
        return answer

    def _read(self, text: str) -> dict[str, str]:
        if self._make_parser is None:
            return {"text": text}
        parser = self._make_parser()
        found = _rendered(Parsed().add([*parser.feed(text), *parser.finish()]))
        return {name: part for name, part in found.items() if part or name == "text"}


def _rendered(parsed: Parsed) -> dict[str, str]:
    return {"text": parsed.content, "reasoning": parsed.reasoning}
