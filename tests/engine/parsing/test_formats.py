"""What each format's texts mean, by examples of their models' templates and of known mistakes of parsers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hearth.engine.parsing import Call, Parsed, Parser, Style, detect_style
from hearth.errors import ConfigError

B = "\uff5c"
ROME = Call("get_weather", '{"city": "Rom"}', True)
NOW = Call("now", "{}", True)


class Parse:
    """Parses a whole answer with the known functions."""

    def __init__(self, tools: dict[str, Any]) -> None:
        self.tools = tools

    def __call__(
        self, tools: str | None, text: str, *, reasoning: str | None = None, opened: bool = False
    ) -> Parsed:
        style = Style(reasoning=reasoning, tools=tools)
        return Parser.of(style, tools=self.tools, opened=opened).parse(text)


@pytest.fixture
def parse(tools: dict[str, Any]) -> Parse:
    return Parse(tools)


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("hermes", "Just text.", "Just text.", []),
        (
            "hermes",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rom"}}\n</tool_call>',
            "",
            [ROME],
        ),
        (
            "hermes",
            'Let me see.\n<tool_call>{"name": "now", "arguments": {}}</tool_call>\n'
            '<tool_call>{"arguments": {"city": "Rom"}, "name": "get_weather"}</tool_call>',
            "Let me see.",
            [NOW, ROME],
        ),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [NOW]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call> Done.', " Done.", [NOW]),
        (
            "hermes",
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Rom\\"}"}</tool_call>',
            "",
            [ROME],
        ),
        ("hermes", "Use <tool_call> to call, or <tool_", "Use <tool_call> to call, or <tool_", []),
        ("hermes", '<tool_call>{"nam": 1}</tool_call>', '<tool_call>{"nam": 1}</tool_call>', []),
        (
            "hermes",
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Ro',
            "",
            [Call("get_weather", '{"city": "Ro', False)],
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
            "",
            [Call("f", '{"a": "</tool_call>"}', True)],
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"a": 1]}</tool_call>',
            "]}</tool_call>",
            [Call("f", '{"a": 1', False)],
        ),
        ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Rom"}}', "", [ROME]),
        (
            "llama3_json",
            '<|python_tag|>{"name": "now", "parameters": {}}; '
            '{"type": "function", "name": "get_weather", "parameters": {"city": "Rom"}}',
            "",
            [NOW, ROME],
        ),
        ("llama3_json", '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),
        ("llama3_json", '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),
        ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}}]', "", [NOW]),
        (
            "mistral",
            'Hm.[TOOL_CALLS][{"name": "now", "arguments": {}}, '
            '{"name": "get_weather", "arguments": {"city": "Rom"}}]',
            "Hm.",
            [NOW, ROME],
        ),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Rom"}[TOOL_CALLS]now{}', "", [ROME, NOW]),
        ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]abc123def[ARGS]{"city": "Rom"}', "", [ROME]),
        ("mistral", "[TOOL_CALLS] none today", "[TOOL_CALLS] none today", []),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nRom\n</parameter>\n</function>\n</tool_call>",
            "",
            [ROME],
        ),
        (
            "qwen3_coder",
            "Sure.\n<function=get_weather>\n<parameter=city>\n"
            "a\n\"b\" </p\n</parameter>\n<parameter=days>\n3\n"
            "</parameter>\n<parameter=where>\n{\"x\": [1]}\n</parameter>\n</function>",
            "Sure.",
            [Call("get_weather", '{"city": "a\\n\\"b\\" </p", "days": 3, "where": {"x": [1]}}', True)],
        ),
        ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", [NOW]),
        (
            "qwen3_coder",
            "<function=get_weather><parameter=days>many</parameter></function>",
            "",
            [Call("get_weather", '{"days": "many"}', True)],
        ),
        (
            "qwen3_coder",
            "<function=get_weather><parameter=city>Ro",
            "",
            [Call("get_weather", '{"city": "Ro', False)],
        ),
        ("qwen3_coder", "<tool_call>hello>", "<tool_call>hello>", []),
        ("pythonic", "[get_weather(city='Rom'), now()]", "", [ROME, NOW]),
        (
            "pythonic",
            '<|python_start|>[get_weather(city="a)b]", days=-2, where={"x": [true, None]})]<|python_end|>',
            "",
            [Call("get_weather", '{"city": "a)b]", "days": -2, "where": {"x": [true, null]}}', True)],
        ),
        ("pythonic", "[1, 2, 3] are numbers", "[1, 2, 3] are numbers", []),
        ("pythonic", "[rm(path='/')]", "[rm(path='/')]", []),
        ("pythonic", "[now(x=open('y'))]", "[now(x=open('y'))]", []),
        ("json_list", '[{"name": "now", "parameters": {}}]', "", [NOW]),
        (
            "deepseek",
            f"Ok.<{B}tool▁calls▁begin{B}><{B}tool▁call▁begin{B}>function<{B}tool▁sep{B}>get_weather\n```json\n"
            f'{{"city": "Rom"}}\n```<{B}tool▁call▁end{B}>\n<{B}tool▁call▁begin{B}>now<{B}tool▁sep{B}>{{}}'
            f"<{B}tool▁call▁end{B}><{B}tool▁calls▁end{B}>",
            "Ok.",
            [ROME, NOW],
        ),
    ],
)  # fmt: skip
def test_calls(parse: Parse, form: str, text: str, content: str, calls: list[Call]) -> None:
    parsed = parse(form, text)
    assert parsed.calls == calls
    assert parsed.content == content


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
        ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
        ("<think>Hm.</think>Yes.", True, "Hm.", "Yes."),
        ("Yes.", False, "", "Yes."),
        ("No end", True, "No end", ""),
        ("<think>a</think>Write <think>b</think>.", False, "a", "Write <think>b</think>."),
        ("<think>a <think> b</think>c", False, "a <think> b", "c"),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("I <think>so</think>", False, "", "I <think>so</think>"),
    ],
)
def test_reasoning(parse: Parse, text: str, opened: bool, reasoning: str, content: str) -> None:
    parsed = parse(None, text, reasoning="think", opened=opened)
    assert (parsed.reasoning, parsed.content) == (reasoning, content)


def test_reasoning_then_calls(parse: Parse) -> None:
    text = '<think>\nThe <tool_call> {"name": "now"} way.\n</think>\n\n<tool_call>{"name": "now"}</tool_call>'
    parsed = parse("hermes", text, reasoning="think")
    assert parsed.reasoning == 'The <tool_call> {"name": "now"} way.'
    assert parsed.content == ""
    assert parsed.calls == [NOW]
    bare = parse("llama3_json", '</think>\n{"name": "now", "parameters": {}}', reasoning="think", opened=True)
    assert bare == Parsed("", "", [NOW])


def test_harmony(parse: Parse) -> None:
    text = (
        "<|channel|>analysis<|message|>I <think>.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>One moment.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Rom"}<|call|>'
    )
    parsed = parse("harmony", text)
    assert parsed == Parsed("I <think>.", "One moment.", [ROME])
    assert parse("harmony", "<|channel|>final<|message|>Yes.<|return|>").content == "Yes."
    # The recipient may stand in the role's part of the header, which the prompt has begun.
    assert parse("harmony", " to=functions.now<|channel|>commentary<|message|>{}").calls == [NOW]
    assert parse("harmony", "no channels at all").content == "no channels at all"
    without = Parser.of(Style(reasoning="harmony", tools="harmony"), calls=False).parse(text)
    assert without.calls == []
    assert without.content == 'One moment.{"city": "Rom"}'


def test_a_call_of_an_unknown_name_is_still_told_where_markers_say_it_is_one(parse: Parse) -> None:
    assert parse("hermes", '<tool_call>{"name": "unheard_of", "arguments": {}}</tool_call>').calls[0].complete


def test_arguments_stream_before_they_are_whole(tools: dict[str, Any]) -> None:
    parser = Parser.of(Style(tools="hermes"))
    parser.feed('<tool_call>{"name": "f", "arguments": {"a": "long')
    assert [event.text for event in parser.feed(" text")] == [" text"]
    parser = Parser.of(Style(tools="qwen3_coder"), tools=tools)
    parser.feed("<function=get_weather><parameter=city>" + "x" * 20)
    assert "".join(event.text for event in parser.feed("y" * 20)).endswith("y" * 8)


def test_values_that_are_no_json_make_a_call_incomplete(parse: Parse) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": NaN, b}}</tool_call>'
    assert parse("hermes", text).calls == [Call("f", '{"a": NaN, b}', False)]


def test_extreme_nesting_and_numbers_raise_nothing(parse: Parse) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": {deep}}}}}</tool_call>'
    (call,) = parse("hermes", text).calls
    assert call.arguments == f'{{"a": {deep}}}'
    assert parse("pythonic", f"[now(a={deep})]").content
    assert parse("pythonic", f"[now(a={'9' * 10_000})]").content
    assert parse("pythonic", r"[now(a='\ud800')]").content
    assert parse("pythonic", r"[now(a='\d')]").calls == [Call("now", r'{"a": "\\d"}', True)]
    surrogate = parse("hermes", r'<tool_call>{"name": "f\ud800", "arguments": {}}</tool_call>').calls
    assert json.dumps([call.name for call in surrogate], ensure_ascii=False).encode()


def test_long_texts_take_linear_time() -> None:
    for piece in ("<tool_call>{", "   ", '{"a": "', "<", "\n"):
        text = piece * 20_000
        parser = Parser.of(Style(reasoning="think", tools="hermes"))
        events = [event for character in text for event in parser.feed(character)] + parser.finish()
        assert "".join(event.raw for event in events) == text


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ messages }}", Style()),
        ('…<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}…', Style(tools="hermes")),
        ("…</think>…<tool_call>…", Style(reasoning="think", tools="hermes")),
        ("…<tool_call>\n<function=example>\n<parameter=p>…", Style(tools="qwen3_coder")),
        ("…<tool_call>{name}\n<arg_key>…</think>", Style(reasoning="think")),
        ("…[TOOL_CALLS]…[/THINK]", Style(reasoning="mistral", tools="mistral")),
        ("…<|python_tag|>…", Style(tools="llama3_json")),
        ("…[func_name1(params_name1=…)]…", Style(tools="pythonic")),
        (f"…<{B}tool▁calls▁begin{B}>…</think>", Style(reasoning="think", tools="deepseek")),
        ("<|start|>…<|channel|>…<|message|>", Style(reasoning="harmony", tools="harmony")),
    ],
)  # fmt: skip
def test_the_style_is_found_in_the_template(template: str, style: Style) -> None:
    assert detect_style(template) == style


def test_a_prompt_may_open_the_reasoning() -> None:
    style = Style(reasoning="think")
    assert style.opened_by("<|im_start|>assistant\n<think>\n")
    assert not style.opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not Style(tools="hermes").opened_by("<think>")
    assert not Style(tools="harmony").opened_by("<think>")


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ConfigError, match="no format of tools 'yaml'"):
        Style(tools="yaml")
    with pytest.raises(ConfigError, match="use one of think"):
        Style(reasoning="silence")
