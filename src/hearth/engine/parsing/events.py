"""What a parser finds in a model's text, and the sum of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["reasoning", "content", "call", "arguments", "end", "markup"]


@dataclass(frozen=True, slots=True)
class Event:
    """One finding. The ``raw`` of all events, joined, is the text that was parsed.

    reasoning, content: more of that text. call: call number ``index`` of function ``text`` begins.
    arguments: more of that call's arguments, a JSON object in the end. end: the call is over; ``complete``
    says whether its arguments are one. markup: markers, which are nobody's text.
    """

    kind: Kind
    text: str
    raw: str
    index: int = 0
    complete: bool = False


@dataclass(slots=True)
class Call:
    """A tool call. Incomplete ones were cut off, or their arguments are no JSON object."""

    name: str
    arguments: str = ""
    complete: bool = False


@dataclass(slots=True)
class Parsed:
    """A whole answer, as its events say."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, events: Iterable[Event]) -> Parsed:
        """Take in more events; returns itself."""
        for event in events:
            match event.kind:
                case "reasoning":
                    self.reasoning += event.text
                case "content":
                    self.content += event.text
                case "call":
                    self.calls.append(Call(event.text))
                case "arguments":
                    self.calls[event.index].arguments += event.text
                case "end":
                    self.calls[event.index].complete = event.complete
                case "markup":
                    pass
        return self
