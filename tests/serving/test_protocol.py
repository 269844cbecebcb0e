"""Requests are decoded strictly: nothing is ignored in silence, every refusal names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearth.serving.constraints import guided_of
from hearth.serving.http import HttpError
from hearth.serving.inputs import as_list, text_inputs
from hearth.serving.messages import chat_messages
from hearth.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    PlainChatRequest,
    Sampling,
    parse,
    routing_fields,
)

HELLO = [{"role": "user", "content": "hello"}]


def refuse(kind: type[Sampling], **body: Any) -> HttpError:
    with pytest.raises(HttpError) as caught:
        parse(json.dumps(body).encode(), kind)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("max_tokens", 0, ">= 1, got 0"),
        ("max_tokens", -5, ">= 1, got -5"),
        ("max_tokens", "many", '"many"'),
        ("max_tokens", 1.5, "1.5"),
        ("temperature", 2.5, "<= 2.0, got 2.5"),
        ("temperature", -0.1, ">= 0.0"),
        ("temperature", "hot", '"hot"'),
        ("top_p", 0, "> 0.0"),
        ("top_p", 1.1, "<= 1.0"),
        ("n", 0, ">= 1"),
        ("n", 1000, "<= 128"),
        ("seed", True, "true"),
        ("stop", 7, "7"),
        ("presence_penalty", 3, "<= 2.0"),
        ("logprobs", 21, "<= 20"),
        ("logit_bias", [1], "array"),
        ("stream", "yes", "bool"),
        ("min_p", 2, "<= 1.0"),
        ("top_k", -2, ">= 0"),
        ("stream_options", 3, "object"),
        ("model", 3, "str"),
    ],
)
def test_a_wrong_value_is_named(field: str, value: Any, says: str) -> None:
    error = refuse(CompletionRequest, prompt="x", **{field: value})
    assert error.param == field
    assert error.message.startswith(f"{field}: expected")
    assert says in error.message


def test_a_number_of_json_that_is_no_number_is_refused() -> None:
    with pytest.raises(HttpError, match="not valid JSON"):
        parse(b'{"prompt": "x", "temperature": NaN}', CompletionRequest)


def test_a_number_beyond_every_float_is_refused() -> None:
    for read, body in (
        (lambda body: parse(body, CompletionRequest), b'{"temperature": 1e400}'),
        (routing_fields, b'{"model": 1e400}'),
    ):
        with pytest.raises(HttpError, match="out of range") as caught:
            read(body)
        assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\x00", b'{"prompt": "x"} trailing'])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        parse(body, CompletionRequest)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("opening", [b"[", b'{"model":', b'{"guided_json":', b'{"prompt":['])
def test_what_is_nested_without_end_is_refused(opening: bytes) -> None:
    for read in (lambda body: parse(body, CompletionRequest), routing_fields):
        with pytest.raises(HttpError) as caught:
            read(opening * 100_000)
        assert caught.value.status == 400
    with pytest.raises(HttpError, match="the body is nested too deeply"):
        parse(b'{"prompt": "x", "guided_json": {"a": ' + b"[" * 100_000, CompletionRequest)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guided_choice": []}, "guided_choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ],
)
def test_a_form_that_allows_nothing_is_refused_by_its_own_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(HttpError) as caught:
        guided_of(parse(json.dumps({"prompt": "x", **body}).encode(), CompletionRequest))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_value_that_is_none_of_a_few_is_named_once() -> None:
    error = refuse(CompletionRequest, prompt="x", response_format={"type": "xml"})
    assert error.message == "response_format.type: 'xml' is not one of its values"


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"5", b"null"])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(HttpError, match="the body: expected `object`"):
        parse(body, CompletionRequest)


def test_an_unknown_field_is_named_with_the_nearest_known_one() -> None:
    error = refuse(ChatRequest, messages=HELLO, temprature=1)
    assert error.code == "unknown_parameter"
    assert error.param == "temprature"
    assert "did you mean temperature?" in error.message
    assert refuse(ChatRequest, messages=HELLO, stream_options={"usage": True}).param == "stream_options.usage"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["audio"]),
        ("web_search_options", {}),
        ("store", True),
    ],
)
def test_what_is_not_supported_is_refused_not_ignored(field: str, value: Any) -> None:
    error = refuse(ChatRequest, messages=HELLO, **{field: value})
    assert error.message == f"{field} is not supported yet"
    assert (error.param, error.code) == (field, "unsupported_parameter")


def test_neutral_values_and_fields_without_effect_are_accepted() -> None:
    body = {
        "messages": HELLO,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "store": False,
        "modalities": ["text"],
        "audio": None,
        "user": "u-1",
        "metadata": {"a": "b"},
        "temperature": None,
        "parallel_tool_calls": True,
    }
    request = parse(json.dumps(body).encode(), ChatRequest)
    assert request.temperature is None


def test_suffix_and_best_of() -> None:
    assert refuse(CompletionRequest, prompt="x", suffix="end").param == "suffix"
    assert refuse(CompletionRequest, prompt="x", best_of=0).param == "best_of"
    assert parse(b'{"prompt": "x", "best_of": 2, "n": 2, "suffix": ""}', CompletionRequest).n == 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: Any, expected: list[Any]) -> None:
    assert text_inputs(prompt, "prompt") == expected


@pytest.mark.parametrize(
    "prompt", [None, 5, [], {}, [[]], ["a", 1], [1, "a"], [[1], []], [True], [-1], [1.5]]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(HttpError) as caught:
        text_inputs(prompt, "prompt")
    assert caught.value.param == "prompt"


def test_a_missing_prompt_and_missing_messages() -> None:
    with pytest.raises(HttpError, match="missing required field 'prompt'"):
        text_inputs(parse(b"{}", CompletionRequest).prompt, "prompt")
    with pytest.raises(HttpError, match="missing required field 'messages'"):
        chat_messages(parse(b"{}", ChatRequest).messages)
    with pytest.raises(HttpError, match="messages is empty"):
        chat_messages(parse(b'{"messages": []}', ChatRequest).messages)


def test_messages_of_all_shapes() -> None:
    body = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": "jo",
            },
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
        ]
    }
    assert chat_messages(parse(json.dumps(body).encode(), ChatRequest).messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab", "name": "jo"},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        (
            {"role": "robot", "content": "x"},
            "messages[0].role",
            'one of system, developer, user, assistant, tool, got "robot"',
        ),
        ({"content": "x"}, "messages[0].role", "missing required field"),
        ({"role": "user", "content": 5}, "messages[0].content", "5"),
        ({"role": "user", "contents": "x"}, "messages[0].contents", "unknown field"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]},
            "messages[0].content[0].type",
            "only text parts",
        ),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{}]},
            "messages[0].tool_calls[0].id",
            "missing required field",
        ),
    ],
)
def test_a_wrong_message_is_named_with_its_place(message: dict[str, Any], param: str, says: str) -> None:
    error = refuse(ChatRequest, messages=[message])
    assert error.param == param
    assert says in error.message


def test_a_message_without_content_is_refused() -> None:
    request = parse(b'{"messages": [{"role": "user", "content": null}]}', ChatRequest)
    with pytest.raises(HttpError) as caught:
        chat_messages(request.messages)
    assert caught.value.param == "messages[0].content"


def test_long_texts_of_people_are_not_repeated_in_errors() -> None:
    error = refuse(CompletionRequest, prompt="x", max_tokens="my secret diary " * 10)
    assert "diary" not in error.message


def test_stop_texts() -> None:
    assert as_list(None) == ()
    assert as_list("a") == ("a",)
    with pytest.raises(HttpError, match="empty string"):
        as_list(["a", ""])
    with pytest.raises(HttpError, match="at most 16"):
        as_list(["a"] * 17)


def test_routing_reads_model_and_stream_only() -> None:
    routing = routing_fields(b'{"model": "m", "stream": true, "anything": [1]}')
    assert (routing.model, routing.stream) == ("m", True)
    assert routing_fields(b"{}").model is None
    with pytest.raises(HttpError, match="model: expected"):
        routing_fields(b'{"model": 3}')
    with pytest.raises(HttpError, match="not valid JSON"):
        routing_fields(b"nope")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__})


@settings(deadline=None)
@given(
    kind=st.sampled_from([ChatRequest, CompletionRequest, PlainChatRequest]),
    body=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), JSON, max_size=4),
)
def test_any_json_is_understood_or_refused_with_400(kind: type[Sampling], body: dict[str, Any]) -> None:
    refused: HttpError | None = None
    try:
        request = parse(json.dumps(body).encode(), kind)
        if isinstance(request, ChatRequest):
            chat_messages(request.messages)
        if isinstance(request, CompletionRequest):
            text_inputs(request.prompt, "prompt")
    except HttpError as error:
        refused = error
    if refused is not None:
        assert refused.status == 400
        assert json.loads(refused.body())["error"]["type"] == "invalid_request_error"
