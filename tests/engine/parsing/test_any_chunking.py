"""For every format, every text and every way to cut it: the same findings, nothing lost, nothing raised."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hearth.engine.parsing import REASONING_FORMATS, TOOL_FORMATS, Event, Parser, Style

BAR = "\uff5c"
STYLES = [
    *(Style(tools=name) for name in TOOL_FORMATS),
    *(Style(reasoning=name) for name in REASONING_FORMATS),
    Style(reasoning="think", tools="hermes"),
    Style(reasoning="think", tools="llama3_json"),
    Style(reasoning="mistral", tools="mistral"),
    Style(tools="harmony"),
]
MARKERS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("<function=", "</function>", "<parameter=", "</parameter>", "<think>", "</think>"),
    *("[THINK]", "[/THINK]", "<|python_start|>", "<|python_end|>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
    f"<{BAR}tool▁calls▁begin{BAR}>",
    f"<{BAR}tool▁call▁begin{BAR}>",
    f"<{BAR}tool▁sep{BAR}>",
    f"<{BAR}tool▁call▁end{BAR}>",
    f"<{BAR}tool▁calls▁end{BAR}>",
]
WORDS = [
    *('{"name": "get_weather", "arguments": {"city": "Rom"}}', '{"name": "now", "parameters": {}}'),
    *('{"parameters": {"days": 2}, "name": "now"}', '{"type": "function", "name": "now"}'),
    *('{"name": "now", "arguments": "{\\"a\\": 1}"}', '{"name": "now", "arguments": null}'),
    *('{"name": "get_weather", "arguments": {"city": "<tool_call>\\"}"}}', '{"name": "x", "age": 3}'),
    *(
        "[now(), get_weather(city='a)\\'b', days=-2)]",
        "[now(*a)]",
        "[1, 2]",
        "get_weather",
        "now",
        "function",
    ),
    *("analysis", "final", "assistant", "commentary to=functions.now <|constrain|>json", "to=now"),
    *(
        "city>",
        "days>",
        "\n",
        " ",
        "3",
        "true",
        "None",
        "```json\n",
        "```",
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ",",
    ),
    *(
        ":",
        ";",
        "(",
        ")",
        "=",
        ">",
        "<",
        "</",
        "<|",
        "[T",
        "é",
        "🔥",
        "\ud800".encode("utf-8", "replace").decode(),
    ),
    *('"name"', '"arguments"', '"parameters"', "<tool_call", "tool_call>", "Hello", "NaN", "1e999", "'"),
]
texts = st.lists(st.sampled_from(MARKERS) | st.sampled_from(WORDS) | st.text(max_size=3), max_size=14).map(
    "".join
)
cuts = st.lists(st.integers(0, 400), max_size=40)


def joined(events: Iterable[Event]) -> list[Event]:
    """Neighbours of one kind and call as one event: what must not depend on how the text was cut."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        flows = event.kind in ("reasoning", "content", "arguments", "markup")
        if last is not None and flows and (last.kind, last.index) == (event.kind, event.index):
            result[-1] = replace(last, text=last.text + event.text, raw=last.raw + event.raw)
        else:
            result.append(event)
    return result


def run(make: Callable[[], Parser], pieces: Iterable[str]) -> list[Event]:
    """The joined events of a text in these pieces."""
    parser = make()
    events = list(itertools.chain.from_iterable(parser.feed(piece) for piece in pieces))
    return joined([*events, *parser.finish()])


def pieces_of(text: str, cuts: Iterable[int]) -> list[str]:
    """The text, cut at these places."""
    places = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: f"{style.reasoning}-{style.tools}")
@settings(deadline=None)
@given(text=texts, cuts=cuts, opened=st.booleans(), known=st.booleans())
def test_any_chunking_is_the_whole(
    tools: dict[str, Any], style: Style, text: str, cuts: list[int], opened: bool, known: bool
) -> None:
    def make() -> Parser:
        return Parser.of(style, tools=tools if known else None, opened=opened)

    whole = run(make, [text])
    assert run(make, pieces_of(text, cuts)) == whole
    assert run(make, text) == whole
    assert "".join(event.raw for event in whole) == text
    check(make, text)


def check(make: Callable[[], Parser], text: str) -> None:
    """What holds for the events of any text."""
    parser = make()
    events = [*parser.feed(text), *parser.finish()]
    is_open, num_calls = False, 0
    for event in events:
        match event.kind:
            case "call":
                assert not is_open
                assert event.index == num_calls
                assert event.text
                is_open, num_calls = True, num_calls + 1
            case "arguments" | "end":
                assert is_open
                assert event.index == num_calls - 1
                is_open = event.kind != "end"
            case "reasoning" | "content":
                assert not is_open
                assert event.text == event.raw
    assert not is_open
    parsed = make().parse(text)
    for number, call in enumerate(parsed.calls):
        arguments = "".join(e.text for e in events if e.kind == "arguments" and e.index == number)
        assert call.arguments == arguments
        if call.complete:
            assert isinstance(json.loads(arguments), dict)


@settings(deadline=None)
@given(text=texts, cuts=cuts)
@example(text="", cuts=[])
def test_a_forced_call_is_all_arguments(text: str, cuts: list[int]) -> None:
    events = run(lambda: Parser.of_call("f"), pieces_of(text, cuts))
    assert "".join(event.raw for event in events) == text
    assert "".join(event.text for event in events if event.kind == "arguments") == text


@pytest.mark.parametrize("style", STYLES, ids=lambda style: f"{style.reasoning}-{style.tools}")
@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="<[{|", codec="utf-8"), min_size=1))
def test_text_without_markers_is_content(style: Style, text: str) -> None:
    assert Parser.of(style).parse(text).content == text
