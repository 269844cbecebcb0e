"""The messages of a conversation, as clients send them and as chat templates read them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from hearth.serving.decoding import invalid, missing


class TextPart(msgspec.Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    """The one kind of content part that is supported."""

    text: str


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    """Name and arguments, a JSON object as text, of a call."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """A call that the assistant made. ``index`` comes back from streams."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One turn. The trailing fields come back when a client appends an answer of ours to its history."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None


# The values of an unsupported field that ask for nothing. None is always neutral.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "refusal": ("",),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
}


def chat_messages(
    messages: list[ChatMessage] | UnsetType | None, *, param: str = "messages"
) -> list[dict[str, Any]]:
    """Messages for a chat template: ``developer`` is ``system``, parts are joined; never empty.

    Arguments of calls become objects, because templates write them as JSON themselves.
    """
    if messages is UNSET or messages is None:
        raise missing(param)
    assert isinstance(messages, list)
    if not messages:
        raise invalid(f"{param} is empty: send at least one message", param)
    return [_turn(message, f"{param}[{index}]") for index, message in enumerate(messages)]


def _turn(message: ChatMessage, where: str) -> dict[str, Any]:
    for name, neutral in _NEUTRAL.items():
        value = getattr(message, name)
        if value is not None and value not in neutral:
            raise invalid(f"{where}.{name} is not supported yet", f"{where}.{name}", "unsupported_parameter")
    content = message.content
    if content is None and not message.tool_calls:
        raise invalid(f"{where}.content is missing", f"{where}.content", "missing_required_parameter")
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": text,
    }
    if message.name is not None:
        turn["name"] = message.name
    for name, role in (
        ("tool_calls", "assistant"),
        ("reasoning_content", "assistant"),
        ("tool_call_id", "tool"),
    ):
        if getattr(message, name) and message.role != role:
            raise invalid(f"{where}.{name} belongs to a message of role {role}", f"{where}.{name}")
    if message.reasoning_content:
        turn["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        turn["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)
        ]
    if message.role == "tool":
        if message.tool_call_id is None:
            raise missing(f"{where}.tool_call_id")
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict)
    except (msgspec.DecodeError, UnicodeEncodeError):
        raise invalid(
            f"{where}.function.arguments must be the text of a JSON object", f"{where}.function.arguments"
        ) from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
