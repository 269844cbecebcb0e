"""JSON bodies as typed requests, strictly: every refusal names the field, the value and what is allowed."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import msgspec

from hearth.serving.http import HttpError

Struct = TypeVar("Struct", bound=msgspec.Struct)
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # that decoding a body may raise


def decode(body: bytes, kind: type[Struct]) -> Struct:
    """Decode ``body``; HttpError 400 if it is no JSON, or not of this kind."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise explain(str(error), body, kind) from None
    except NOT_JSON as error:
        raise not_json(error) from None


def not_json(error: Exception) -> HttpError:
    """Why a body is no JSON, of an error in NOT_JSON."""
    what = "is nested too deeply" if isinstance(error, RecursionError) else f"is not valid JSON: {error}"
    return HttpError(400, f"the body {what}", code="invalid_json")


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> HttpError:
    """A value that is refused."""
    return HttpError(400, message, param=param, code=code)


def missing(param: str) -> HttpError:
    """A field that must be there."""
    return invalid(f"missing required field {param!r}", param, "missing_required_parameter")


_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`")
_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>\$.*?|key in \$.*?)`)?$", re.DOTALL)


def explain(text: str, body: bytes, kind: type[msgspec.Struct]) -> HttpError:
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
        what = "Expected one of system, developer, user, assistant, tool"
    given = _value_at(body, param)
    what = what[0].lower() + what[1:]
    shown = f"{param}: {what}" if param else f"the body: {what}"
    if match := re.fullmatch(r"invalid enum value '(.*)'", what, re.DOTALL):
        shown, given = f"{param}: {match[1]!r} is not one of its values", None
    if param and given is not None and not what.endswith(f"got {given}"):
        shown += f", got {given}"
    return HttpError(400, shown, param=param or None, code="invalid_value")


def _value_at(body: bytes, param: str) -> str | None:
    """The short scalar at ``a.b[0].c`` of the body, as JSON; text of people is not repeated."""
    try:
        value: Any = msgspec.json.decode(body)
    except NOT_JSON:  # a number out of range, or the depth, which is what is being explained
        return None
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", param):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            return None
    if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 20):
        return msgspec.json.encode(value).decode()
    return None
