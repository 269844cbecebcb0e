"""From raw bytes to documents: decoding, fields of rows, conversations. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hearth.config.recipe import SourceSection
from hearth.data.chat import check_messages
from hearth.data.samples import (
    Sample,
    SampleFields,
    filled,
    parse_feedback,
    parse_preference,
    parse_prompt,
    text_field,
    unify_newlines,
)
from hearth.data.sources import RawDocument, stdlib_group
from hearth.data.stdlib import decode_source, docs_text, parse_module, topics_text
from hearth.errors import DataError

_SAMPLES = {"preference": parse_preference, "feedback": parse_feedback, "prompts": parse_prompt}
_TOPICS = "pydoc_data.topics"


@dataclass(frozen=True)
class ParseOptions:
    """The keys of a source that say which fields of a row are read."""

    path: str
    text_field: str
    messages_field: str
    prompt_field: str | None
    response_field: str | None
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    label_field: str = "label"

    @classmethod
    def of(cls, section: SourceSection) -> ParseOptions:
        """Those of one source of a recipe."""
        return cls(**{field.name: getattr(section, field.name) for field in dataclasses.fields(cls)})

    @property
    def sample_fields(self) -> SampleFields:
        """The keys that matter to comparisons, verdicts and prompts."""
        return SampleFields(
            self.messages_field,
            self.prompt_field,
            self.response_field,
            self.chosen_field,
            self.rejected_field,
            self.label_field,
        )


@dataclass(frozen=True)
class Document:
    """A text, a conversation, or a sample. ``group`` empty: the split follows the content."""

    source: int
    id: str
    group: str
    text: str
    messages: tuple[dict[str, Any], ...] | None = None
    sample: Sample | None = None

    @property
    def turns(self) -> Sequence[dict[str, Any]]:
        """Every message: of the conversation, or of the prompt and all answers."""
        if self.sample is not None:
            return [*self.sample.prompt, *self.sample.completions]
        return self.messages or ()


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
            text = text_field(_row(raw), options[raw.source].text_field, raw.where, "text_field")
            _check_unicode(text, raw)
            return [Document(raw.source, raw.id, raw.group, unify_newlines(text))]
        case "chat":
            messages = _messages(_row(raw), options[raw.source], raw.where)
            for message in messages:
                _check_unicode(message["content"], raw)
            return [Document(raw.source, raw.id, raw.group, "", tuple(messages))]
        case "stdlib":
            return _stdlib_documents(raw)
        case "preference" | "feedback" | "prompts":
            sample = _SAMPLES[raw.kind](_row(raw), options[raw.source].sample_fields, raw.where)
            document = Document(raw.source, raw.id, raw.group, "", sample=sample)
            for message in document.turns:
                _check_unicode(message["content"], raw)
            return [document]


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
    return unify_newlines(text.removeprefix("\ufeff") if raw.offset == 0 else text)


def _utf8_message(raw: RawDocument, error: UnicodeDecodeError) -> str:
    place = f"at offset {raw.offset + error.start}"
    return f"{raw.where} is not valid UTF-8: byte 0x{raw.data[error.start]:02x} {place} ({error.reason})"


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
        {"role": "user", "content": filled(row, options.prompt_field, where, "prompt_field")},
        {"role": "assistant", "content": filled(row, options.response_field, where, "response_field")},
    ]


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
