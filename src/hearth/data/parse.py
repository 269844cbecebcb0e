"""From raw bytes to documents: decoding, fields of rows, conversations. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hearth.data.chat import check_messages
from hearth.data.sources import RawDocument, stdlib_group
from hearth.data.stdlib import decode_source, docs_text, parse_module, topics_text
from hearth.errors import DataError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_TOPICS = "pydoc_data.topics"


@dataclass(frozen=True)
class ParseOptions:
    """The keys of a source that say which fields of a row are read."""

    path: str
    text_field: str
    messages_field: str
    prompt_field: str | None
    response_field: str | None


@dataclass(frozen=True)
class Document:
    """A text or a conversation. ``group`` empty: the split follows the content."""

    source: int
    id: str
    group: str
    text: str
    messages: tuple[dict[str, Any], ...] | None = None


class BadInput(Exception):
    """Bytes that are not text; skipped and counted, or an error, as ``data.on_bad_file`` says."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        return (BadInput, (self.reason, self.message))


def parse(raw: RawDocument, options: Sequence[ParseOptions]) -> list[Document]:
    """The documents in one raw document. Raises BadInput for bytes that are not text, DataError otherwise."""
    match raw.kind:
        case "text":
            return [Document(raw.source, raw.id, raw.group, decode_text(raw))]
        case "json":
            text = _field(_row(raw), options[raw.source].text_field, raw.where, "text_field")
            _check_unicode(text, raw)
            return [Document(raw.source, raw.id, raw.group, _unify_newlines(text))]
        case "chat":
            messages = _messages(_row(raw), options[raw.source], raw.where)
            for message in messages:
                _check_unicode(message["content"], raw)
            return [Document(raw.source, raw.id, raw.group, "", tuple(messages))]
        case "stdlib":
            return _stdlib_documents(raw)


def decode_text(raw: RawDocument) -> str:
    """UTF-8 text with ``\\n`` line ends and without a byte order mark."""
    nul = raw.data.find(b"\0")
    if nul >= 0:
        utf16 = raw.offset == 0 and raw.data[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = "UTF-16 text, not UTF-8" if utf16 else "a binary file"
        message = f"{raw.where} is {kind} (byte 0x00 at offset {raw.offset + nul})"
        raise BadInput("binary", message)
    try:
        text = raw.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput("invalid_utf8", _utf8_message(raw, error)) from error
    return _unify_newlines(text.removeprefix("\ufeff") if raw.offset == 0 else text)


def _utf8_message(raw: RawDocument, error: UnicodeDecodeError) -> str:
    place = f"at offset {raw.offset + error.start}"
    return f"{raw.where} is not valid UTF-8: byte 0x{raw.data[error.start]:02x} {place} ({error.reason})"


def _unify_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _check_unicode(text: str, raw: RawDocument) -> None:
    """JSON can spell half a surrogate pair, which no UTF-8 text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{raw.where} holds U+{ord(text[error.start]):04X}, half a surrogate pair"
        raise BadInput("invalid_utf8", message) from error


def _row(raw: RawDocument) -> dict[str, Any]:
    try:
        row = json.loads(raw.data)
    except UnicodeDecodeError as error:
        raise BadInput("invalid_utf8", _utf8_message(raw, error)) from error
    except RecursionError as error:
        raise DataError(f"{raw.where}: JSON nested too deeply") from error
    except ValueError as error:
        start = raw.data[:60].decode(errors="replace").strip()
        raise DataError(
            f"{raw.where} is not valid JSON: {error}; the row begins {start!r}",
            fix="correct or remove the line; each line must be one JSON object",
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{raw.where} is {type(row).__name__}, not a JSON object", fix='write rows like {"text": "…"}'
        )
    return row


def _field(row: dict[str, Any], key: str, where: str, setting: str) -> str:
    if key not in row:
        raise DataError(
            f"{where} has no key {key!r}; its keys are {', '.join(map(repr, row)) or 'none'}",
            fix=f"set {setting} of the source to the right key",
        )
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {type(value).__name__}, not a string")
    return value


def _messages(row: dict[str, Any], options: ParseOptions, where: str) -> list[dict[str, Any]]:
    if options.prompt_field is None and options.response_field is None:
        if options.messages_field not in row:
            raise DataError(
                f"{where} has no key {options.messages_field!r}; its keys are {', '.join(map(repr, row))}",
                fix="set messages_field of the source, or prompt_field and response_field",
            )
        return check_messages(row[options.messages_field], where)
    if options.prompt_field is None or options.response_field is None:
        missing = "prompt_field" if options.prompt_field is None else "response_field"
        raise DataError(
            f"source {options.path} sets only one of prompt_field and response_field",
            fix=f"set {missing} as well",
        )
    return [
        {"role": "user", "content": _filled(row, options.prompt_field, where, "prompt_field")},
        {"role": "assistant", "content": _filled(row, options.response_field, where, "response_field")},
    ]


def _filled(row: dict[str, Any], pattern: str, where: str, setting: str) -> str:
    """The value of a key, or of a pattern such as ``"{instruction}\\n\\n{input}"``, trimmed."""
    if not _PLACEHOLDER.search(pattern):
        return _unify_newlines(_field(row, pattern, where, setting))
    filled = _PLACEHOLDER.sub(lambda match: _field(row, match[1], where, setting), pattern)
    return _unify_newlines(filled).strip()


def _stdlib_documents(raw: RawDocument) -> list[Document]:
    try:
        source = decode_source(raw.data)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise BadInput("invalid_utf8", f"{raw.where} cannot be decoded: {error}") from error
    module = parse_module(raw.id, source)
    group = stdlib_group(module.name if module else raw.id)
    if raw.id == _TOPICS:
        return [Document(raw.source, f"{raw.id}:docs", group, topics_text(source))]
    documents = [Document(raw.source, raw.id, group, source)]
    prose = docs_text(module) if module else ""
    if prose:
        documents.append(Document(raw.source, f"{raw.id}:docs", group, prose))
    return documents
