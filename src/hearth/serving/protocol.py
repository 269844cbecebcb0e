"""What a request may say: the OpenAI fields that we know, our extensions, and what is refused.

Nothing is ignored in silence. A field is one of: used; of no effect on the answer (``user``, ``metadata`` …);
known to OpenAI but not supported here, refused unless it holds its neutral value; unknown, refused by name.
Extensions beyond OpenAI: ``top_k``, ``min_p``, ``min_tokens``, ``ignore_eos``, ``stop_token_ids``,
``repetition_penalty``.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from hearth.serving.http import HttpError

MAX_CHOICES = 128
MAX_STOPS = 16

Temperature = Annotated[float, Meta(ge=0.0, le=2.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; of no effect on the answer


class Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that every generation request may carry. ``None`` is the same as absent."""

    model: str | None = None
    max_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    # Extensions.
    top_k: NonNegative | None = None
    min_p: Share | None = None
    min_tokens: NonNegative | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[NonNegative] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None


class _OpenAIFields(Sampling, kw_only=True):
    stream_options: StreamOptions | None = None
    # Of no effect on the answer.
    user: Any = None
    metadata: Any = None
    # Refused unless neutral; see _NEUTRAL.
    response_format: Any = None
    service_tier: Any = None
    store: Any = None


class CompletionRequest(_OpenAIFields, kw_only=True):
    """``POST /v1/completions``."""

    prompt: Any | UnsetType = UNSET
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: Any = None
    best_of: Any = None


class TextPart(msgspec.Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    """The one kind of content part that is supported."""

    text: str


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One turn. The trailing fields come back when a client appends an answer of ours to its history."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    tool_calls: Any = None
    function_call: Any = None


class ChatRequest(_OpenAIFields, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] | UnsetType = UNSET
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    parallel_tool_calls: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class GenerateRequest(Sampling, kw_only=True):
    """``POST /generate``: one prompt, one answer."""

    prompt: str | list[NonNegative] | UnsetType = UNSET


class PlainChatRequest(Sampling, kw_only=True):
    """``POST /chat``: ``messages``, or ``message`` with an optional ``system`` text and ``history``."""

    messages: list[ChatMessage] | None = None
    message: str | None = None
    system: str | None = None
    history: list[ChatMessage] | None = None


# The values of an unsupported field that ask for nothing. None is always neutral.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "refusal": ("",),
    "annotations": ([],),
    "audio": (),
    "tool_calls": ([],),
    "function_call": (),
}

Parsed = TypeVar("Parsed", bound=Sampling)


def parse(body: bytes, kind: type[Parsed]) -> Parsed:
    """Decode ``body`` strictly; HttpError 400 names the field, the value and what is allowed."""
    try:
        request = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), body, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HttpError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    _refuse_unsupported(request)
    return request


class _Routing(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None


_routing_decoder = msgspec.json.Decoder(_Routing)


def routing_fields(body: bytes) -> tuple[str | None, bool]:
    """``model`` and ``stream`` of a request; the worker reads the rest. HttpError 400 if it is no object."""
    try:
        routing = _routing_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error), body, Sampling) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HttpError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    return routing.model, bool(routing.stream)


def _refuse_unsupported(request: Sampling) -> None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(request, name, None)
        if value is not None and value not in neutral:
            raise HttpError(400, f"{name} is not supported yet", param=name, code="unsupported_parameter")
    best_of, n = getattr(request, "best_of", None), request.n or 1
    if best_of is not None and best_of != n:
        raise HttpError(
            400, f"best_of {best_of!r} is not supported: leave it out or make it equal to n ({n})",
            param="best_of", code="unsupported_parameter",
        )  # fmt: skip
    for list_name in ("messages", "history"):
        for index, message in enumerate(getattr(request, list_name, None) or ()):
            for name, neutral in _MESSAGE_NEUTRAL.items():
                value = getattr(message, name)
                if value is not None and value not in neutral:
                    where = f"{list_name}[{index}].{name}"
                    raise HttpError(
                        400, f"{where} is not supported yet", param=where, code="unsupported_parameter"
                    )


_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`")
_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>\$.*?|key in \$.*?)`)?$", re.DOTALL)


def _explain(text: str, body: bytes, kind: type[msgspec.Struct]) -> HttpError:
    """Turn msgspec's message into one that names the field in the caller's spelling and the value given."""
    match = _AT.match(text)
    what = match["what"] if match else text
    path = ((match["path"] if match else None) or "$").removeprefix("key in ")
    param = path.removeprefix("$").removeprefix(".")
    if unknown := _UNKNOWN.match(what):
        name = f"{param}.{unknown[1]}" if param else unknown[1]
        near = difflib.get_close_matches(unknown[1], kind.__struct_fields__, n=1) if not param else []
        hint = f"; did you mean {near[0]}?" if near else ""
        return HttpError(400, f"unknown field {name!r}{hint}", param=name, code="unknown_parameter")
    if re.fullmatch(r"messages\[\d+\]\.content\[\d+\]\.type", param) or (
        ".content[" in param and "missing required field `type`" in what
    ):
        return HttpError(
            400, f"{param}: only text parts are supported: {{\"type\": \"text\", \"text\": …}}",
            param=param, code="unsupported_parameter",
        )  # fmt: skip
    if missing := re.match(r"Object missing required field `(.*?)`", what):
        param = f"{param}.{missing[1]}" if param else missing[1]
        what = "missing required field"
    if param.endswith(".role") and what.startswith("Invalid enum"):
        what = "Expected one of system, developer, user, assistant"
    given = _value_at(body, param)
    what = what[0].lower() + what[1:]
    shown = f"{param}: {what}" if param else f"the body: {what}"
    if param and given is not None and not what.endswith(f"got {given}"):
        shown += f", got {given}"
    return HttpError(400, shown, param=param or None, code="invalid_value")


def _value_at(body: bytes, param: str) -> str | None:
    """The short scalar at ``a.b[0].c`` of the body, as JSON; text of people is not repeated."""
    try:
        value: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:  # a number out of range, which is what is being explained
        return None
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", param):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            return None
    if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 20):
        return msgspec.json.encode(value).decode()
    return None


def as_list(stop: str | list[str] | None) -> tuple[str, ...]:
    """``stop`` as a tuple; HttpError 400 for empty strings or too many."""
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise HttpError(400, f"stop has {len(stops)} entries, at most {MAX_STOPS} are allowed", param="stop")
    if any(not text for text in stops):
        raise HttpError(
            400, "stop contains an empty string, which would end every answer at once", param="stop"
        )
    return stops


def completion_prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a completion: a string, strings, token ids, or lists of token ids; never empty."""
    if prompt is UNSET or prompt is None:
        raise HttpError(
            400, "missing required field 'prompt'", param="prompt", code="missing_required_parameter"
        )
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            return list(prompt)
        if _is_token_ids(prompt):
            return [list(prompt)]
        if all(isinstance(item, list) and item and _is_token_ids(item) for item in prompt):
            return [list(item) for item in prompt]
    raise HttpError(
        400,
        "prompt: a string, a list of strings, a list of token ids (integers from 0) or a list of such lists; "
        "no list may be empty",
        param="prompt",
        code="invalid_value",
    )


def _is_token_ids(items: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items)


def chat_messages(
    messages: list[ChatMessage] | UnsetType | None, *, param: str = "messages"
) -> list[dict[str, str]]:
    """Messages for a chat template: ``developer`` is ``system``, parts are joined; never empty."""
    if messages is UNSET or messages is None:
        raise HttpError(
            400, f"missing required field {param!r}", param=param, code="missing_required_parameter"
        )
    assert isinstance(messages, list)
    if not messages:
        raise HttpError(
            400, f"{param} is empty: send at least one message", param=param, code="invalid_value"
        )
    result = []
    for index, message in enumerate(messages):
        content = message.content
        if content is None:
            where = f"{param}[{index}].content"
            raise HttpError(400, f"{where} is missing", param=where, code="missing_required_parameter")
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        turn = {"role": "system" if message.role == "developer" else message.role, "content": text}
        if message.name is not None:
            turn["name"] = message.name
        result.append(turn)
    return result
