"""The format of Qwen3-Coder: ``<tool_call><function=f><parameter=a>text</parameter></function></tool_call>``.

Values are bare text; the schemas of the tools tell which of them are no strings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hearth.engine.parsing.envelope import MAX_HEAD, closing
from hearth.engine.parsing.scanning import load_json
from hearth.engine.parsing.source import Reading, Source


def xml_call(source: Source, marker: str) -> Reading[None]:
    """One call, after ``<tool_call>`` or where that is missing after ``<function=``."""
    yield from source.skip_space()
    if marker == "<tool_call>" and not (yield from source.accept("<function=")):
        return
    name = yield from source.read_until((">",), MAX_HEAD)
    if name is None or not source.allows(name.strip(), known_only=False):
        return
    source.take(1)
    name = name.strip()
    source.begin_call(name)
    opening = "{"
    while True:
        yield from source.skip_space()
        if not (yield from source.accept("<parameter=")):
            break
        key = yield from source.read_until((">",), MAX_HEAD)
        if key is None:
            source.release("arguments")  # broken, and shown as it stands
            source.end_call()
            return
        source.take(1)
        source.arguments(f"{opening}{_quote(key.strip())}: ")
        opening = ", "
        if not (yield from _xml_value(source, _types(source, name, key.strip()))):
            source.end_call()
            return
    closed = yield from source.accept("</function>")
    if closed:
        source.arguments("{}" if opening == "{" else "}")
    source.end_call()
    if closed:
        yield from closing(source, "</tool_call>")


def _xml_value(source: Source, types: Sequence[str]) -> Reading[bool]:
    """One parameter: a string passes through, other types wait until they are whole."""
    end, as_text = "</parameter>", "string" in types or not types
    yield from source.accept("\n")
    if as_text:
        source.arguments('"')
    parts = list[str]()
    while True:
        at = source.unread.find(end)
        done = at >= 0
        stop = at if done else max(0, len(source.unread) - len(end))
        # The line break before the end belongs to it, and is never shown before that is known.
        if done and source.unread[:at].endswith("\n"):
            stop -= 1
        text = source.take(stop)
        if as_text and text:
            source.arguments(_quote(text)[1:-1])
        parts.append(text)
        if done:
            break
        if not (yield from source.more()):
            rest = source.take(len(source.unread))
            source.arguments(_quote(rest)[1:-1] if as_text else "".join(parts) + rest)
            return False
    yield from source.accept("\n")
    source.take(len(end))
    value = '"' if as_text else _typed("".join(parts))
    source.arguments(value)
    return True


def _types(source: Source, name: str, key: str) -> Sequence[str]:
    """The JSON types that a parameter may have; empty where the tools do not say."""
    schema: Any = (source.tools or {}).get(name)
    schema = schema.get("properties", {}).get(key) if isinstance(schema, dict) else None
    if not isinstance(schema, dict):
        return ()
    options = schema.get("anyOf") or schema.get("oneOf") or [schema]
    found = [option.get("type") for option in options if isinstance(option, dict)]
    return [each for kind in found for each in (kind if isinstance(kind, list) else [kind]) if each]


def _typed(text: str) -> str:
    """A value that is no string by its schema, as JSON; what is none stays a string."""
    text = text.strip()
    if load_json(text) is None and text != "null":
        lowered = {"True": "true", "False": "false", "None": "null"}.get(text)
        return lowered or _quote(text)
    return text


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
