"""Parsers: text in pieces of any size in, events out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hearth.engine.parsing import harmony
from hearth.engine.parsing.events import Event, Parsed
from hearth.engine.parsing.reasoning import REASONING_FORMATS, read_reasoning
from hearth.engine.parsing.source import Reading, Source
from hearth.engine.parsing.tools import TOOL_FORMATS, read_text
from hearth.errors import ConfigError

HARMONY = "harmony"  # both a format of reasoning and of tool calls


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a model writes: the names of its formats, None where it has none."""

    reasoning: str | None = None
    tools: str | None = None

    def __post_init__(self) -> None:
        _check("reasoning", self.reasoning, (*REASONING_FORMATS, HARMONY))
        _check("tools", self.tools, (*TOOL_FORMATS, HARMONY))
        if self.reasoning != self.tools and self.tools == HARMONY:
            object.__setattr__(self, "reasoning", HARMONY)  # one cannot be read without the other

    @property
    def markers(self) -> tuple[str, ...]:
        """The markers of these formats; where a tokenizer hides some, the text cannot be parsed."""
        if self.reasoning == HARMONY:
            return harmony.MARKERS
        tools = () if self.tools is None else TOOL_FORMATS[self.tools].starts
        if self.reasoning is None:
            return tools
        reasoning = REASONING_FORMATS[self.reasoning]
        return (*tools, reasoning.start, reasoning.end)

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt, by its last characters, has begun the reasoning already."""
        if self.reasoning in (None, HARMONY):
            return False
        assert self.reasoning is not None
        return prompt.rstrip().endswith(REASONING_FORMATS[self.reasoning].start)


class Parser:
    """Parses one answer. The events of `feed` and `finish` are the same, joined, for every way to cut it."""

    def __init__(self, source: Source, reading: Reading[None]) -> None:
        self._source = source
        self._reading: Reading[None] | None = reading
        self._advance()

    @classmethod
    def of(
        cls,
        style: Style,
        *,
        tools: Mapping[str, Any] | None = None,
        opened: bool = False,
        calls: bool = True,
    ) -> Parser:
        """A parser of ``style``.

        tools: names of the functions that may be called → JSON schemas of their parameters. opened: the
        prompt has begun the reasoning. calls: whether calls are looked for.
        """
        source = Source(tools)
        return cls(source, _read(source, style, opened=opened, calls=calls))

    @classmethod
    def of_call(cls, name: str) -> Parser:
        """A parser of text that is nothing but the arguments of one call of ``name``."""
        source = Source()
        return cls(source, _read_call(source, name))

    def feed(self, text: str) -> list[Event]:
        """What is certain now and was not before."""
        if text:
            self._source.unread += text
            self._advance()
        return self._take()

    def finish(self) -> list[Event]:
        """The rest; a call that was cut off is incomplete."""
        self._source.ended = True
        self._advance()
        assert self._reading is None
        self._source.release("content")
        return self._take()

    def parse(self, text: str) -> Parsed:
        """A whole answer at once."""
        return Parsed().add([*self.feed(text), *self.finish()])

    def _advance(self) -> None:
        if self._reading is not None:
            try:
                next(self._reading)
            except StopIteration:
                self._reading = None

    def _take(self) -> list[Event]:
        events, self._source.events = self._source.events, []
        return events


def _read(source: Source, style: Style, *, opened: bool, calls: bool) -> Reading[None]:
    if style.reasoning == HARMONY:
        yield from harmony.read_harmony(source, calls=calls and style.tools == HARMONY)
        return
    if style.reasoning is not None:
        yield from read_reasoning(source, REASONING_FORMATS[style.reasoning], opened=opened)
    yield from read_text(source, TOOL_FORMATS[style.tools] if calls and style.tools is not None else None)


def _read_call(source: Source, name: str) -> Reading[None]:
    source.begin_call(name)
    yield from source.text("arguments", (), trim=False)
    source.end_call()


def _check(what: str, name: str | None, allowed: tuple[str, ...]) -> None:
    if name is not None and name not in allowed:
        raise ConfigError(f"there is no format of {what} {name!r}", fix=f"use one of {', '.join(allowed)}")


def detect_style(template: str) -> Style:
    """The formats that a chat template's text speaks of."""
    if "<|channel|>" in template and "<|message|>" in template:
        return Style(reasoning=HARMONY, tools=HARMONY)
    found = [
        each.name
        for each in TOOL_FORMATS.values()
        if any(hint in template for hint in each.hints) and not any(word in template for word in each.against)
    ]
    thinking = [each.name for each in REASONING_FORMATS.values() if each.end in template]
    return Style(reasoning=thinking[0] if thinking else None, tools=found[0] if found else None)
