"""Tools and forms of answers: what is enforced, what is refused."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgspec
import pytest

from hearth.engine.params import Guided
from hearth.errors import RequestError
from hearth.serving.constraints import form_field, guided_of
from hearth.serving.http import HttpError
from hearth.serving.messages import chat_messages
from hearth.serving.protocol import ChatRequest, CompletionRequest, parse
from hearth.serving.tool_use import ToolUse, tool_use

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "$defs": {"node": {"type": "object", "properties": {"child": {"$ref": "#/$defs/node"}}}},
}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


def chat(**body: Any) -> ChatRequest:
    body.setdefault("messages", [{"role": "user", "content": "x"}])
    return parse(json.dumps(body).encode(), ChatRequest)


def use(*tools: dict[str, Any], choice: Any = None, parallel: bool | None = None) -> ToolUse | None:
    request = chat(tools=list(tools), tool_choice=choice, parallel_tool_calls=parallel)
    return tool_use(request.tools, request.tool_choice, request.parallel_tool_calls)


def test_tools_are_optional_by_default() -> None:
    both = use(tool("a", CITY), tool("b"))
    assert both is not None
    assert (both.mode, both.guided(), both.max_calls) == ("auto", None, None)
    assert list(both.schemas) == ["a", "b"]
    assert both.described[1]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert use(tool("a"), choice="none") is None
    assert tool_use(None, "auto", None) is None


def test_a_named_tool_is_its_schema() -> None:
    named = use(tool("a", CITY), tool("b"), choice={"type": "function", "function": {"name": "a"}})
    assert named is not None
    assert named.guided() == Guided(json=CITY)


def test_a_required_call_is_a_list_of_calls() -> None:
    required = use(tool("a", CITY), tool("tree", TREE), choice="required", parallel=False)
    assert required is not None
    guided = required.guided()
    assert guided is not None
    assert isinstance(guided.json, dict)
    validator = jsonschema.Draft202012Validator(guided.json)
    good = [
        [{"name": "a", "parameters": {"city": "Rom"}}],
        [{"name": "tree", "parameters": {"root": {"child": {"child": {}}}}}],
    ]
    bad: list[Any] = [
        [],
        [{"name": "c", "parameters": {}}],
        [{"name": "a", "parameters": {}}],
        [{"name": "a"}],
        [{"name": "tree", "parameters": {"root": {"child": {"child": 3}}}}],
        [good[0][0], good[0][0]],
    ]
    assert all(validator.is_valid(value) for value in good)
    assert not any(validator.is_valid(value) for value in bad)


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([tool("a"), tool("a")], None, "tools[1].function.name"),
        ([tool("a b")], None, "tools[0].function.name"),
        ([tool("")], None, "tools[0].function.name"),
        ([tool("a")], {"type": "function", "function": {"name": "b"}}, "tool_choice"),
        ([], "required", "tool_choice"),
        ([tool(f"f{i}") for i in range(129)], None, "tools"),
    ],
)
def test_what_contradicts_itself_is_refused(tools: list[Any], choice: Any, param: str) -> None:
    with pytest.raises(HttpError) as caught:
        use(*tools, choice=choice)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("tools", [{"type": "function"}], "tools[0].function"),
        ("tools", [{"type": "retrieval", "function": {"name": "f"}}], "tools[0].type"),
        ("tools", [tool("f", [])], "tools[0].function.parameters"),
        ("tool_choice", "sometimes", "tool_choice"),
        ("response_format", {"type": "yaml"}, "response_format.type"),
        ("response_format", {"type": "json_object", "extra": 1}, "response_format.extra"),
        ("guided_choice", "a", "guided_choice"),
        ("structured_outputs", {"jsn": {}}, "structured_outputs.jsn"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(field: str, value: Any, param: str) -> None:
    with pytest.raises(HttpError) as caught:
        chat(**{field: value})
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Guided(json={"type": "object"})),
        (
            {
                "response_format": {
                    "type": "json_schema", "json_schema": {"name": "c", "schema": CITY, "strict": True}
                }
            },
            Guided(json=CITY),
        ),
        ({"guided_json": CITY}, Guided(json=CITY)),
        ({"guided_json": json.dumps(CITY)}, Guided(json=json.dumps(CITY))),
        ({"guided_regex": "a+"}, Guided(regex="a+")),
        ({"guided_grammar": 'start: "a"'}, Guided(grammar='start: "a"')),
        ({"guided_choice": ["a", "b"]}, Guided(choice=("a", "b"))),
        ({"structured_outputs": {"regex": "a+"}}, Guided(regex="a+")),
        ({"structured_outputs": {"json_object": True}}, Guided(json={"type": "object"})),
    ],
)  # fmt: skip
def test_forms_of_an_answer(fields: dict[str, Any], expected: Guided | None) -> None:
    request = parse(json.dumps({"prompt": "x", **fields}).encode(), CompletionRequest)
    assert guided_of(request) == expected


def test_an_answer_has_one_form() -> None:
    with pytest.raises(HttpError, match="guided_regex and response_format are given"):
        guided_of(chat(guided_regex="a", response_format={"type": "json_object"}))
    with pytest.raises(HttpError, match=r"missing required field 'response_format.json_schema.schema'"):
        guided_of(chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}))
    with pytest.raises(HttpError, match=r"missing required field 'response_format.json_schema'"):
        guided_of(chat(response_format={"type": "json_schema"}))
    with pytest.raises(RequestError, match="not empty"):
        guided_of(chat(guided_regex=""))
    with pytest.raises(HttpError, match="guided_choice is empty"):
        guided_of(chat(guided_choice=[]))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "guided"),
        ({"response_format": {"type": "text"}}, "guided"),
        ({"response_format": {"type": "text"}, "guided_regex": "("}, "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ],
)
def test_errors_name_the_field_that_constrains(fields: dict[str, Any], named: str) -> None:
    assert form_field(chat(**fields)) == named


def test_calls_and_results_for_a_template() -> None:
    turns = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "call_1", "function": {"name": "a", "arguments": '{"city": "Rom"}'}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]  # fmt: skip
    assert chat_messages(chat(messages=turns).messages)[1:] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "a", "arguments": {"city": "Rom"}}}
            ],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
    ]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "reasoning_content": "1"}, "messages[0].reasoning_content"),
        ({"role": "assistant"}, "messages[0].content"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "3"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"role": "user", "content": "x", "function_call": {"name": "f"}}, "messages[0].function_call"),
    ],
)
def test_messages_that_make_no_sense(message: dict[str, Any], param: str) -> None:
    with pytest.raises(HttpError) as caught:
        chat_messages(chat(messages=[message]).messages)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_the_enforced_schema_travels() -> None:
    """It goes to the engine's process as MessagePack."""
    required = use(tool("tree", TREE), choice="required")
    assert required is not None
    guided = required.guided()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(guided), type=Guided) == guided
