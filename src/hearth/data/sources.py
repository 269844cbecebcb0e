"""Sources: what a recipe names, resolved to files, hashed, and read as raw documents.

Reading does no more than find where documents begin and end, so that parsing, filtering and tokenising can
run in worker processes. The order is fixed: sources as listed, files sorted, documents as they stand.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hearth.config.recipe import SourceSection
from hearth.data.files import JSON_SUFFIXES, find_files, open_binary, plain_suffix, read_sections, sha256_file
from hearth.data.manifest import SAMPLE_PARTS, kind_of
from hearth.data.manifest import Kind as DocumentKind
from hearth.data.progress import Progress
from hearth.data.stdlib import LICENSE, decode_source, module_name, parse_module, stdlib_files, stdlib_root
from hearth.data.stdlib_chat import GENERATOR_VERSION, make_questions
from hearth.errors import DataError

Kind = Literal["text", "json", "chat", "preference", "feedback", "prompts", "stdlib"]

# A file named as a source is one long text: it is cut, and each section is split on its own. A file of a
# folder is a document; only giants are cut, so that memory stays bounded, and all parts go the same way.
FILE_SECTION_BYTES = 16 << 10
FOLDER_SECTION_BYTES = 1 << 20
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class RawDocument:
    """Bytes of one document, not yet decoded. ``group`` is what the split keeps together; empty means the
    document's own content. ``where`` and ``offset`` place it for error messages."""

    source: int
    kind: Kind
    id: str
    group: str
    data: bytes
    where: str
    offset: int = 0


@dataclass(frozen=True)
class InputFile:
    """A file of a source, the id it gives its documents, and how it is read."""

    path: Path
    id: str
    kind: Kind


@dataclass(frozen=True)
class Source:
    """A source resolved to files. ``is_file`` tells a file named as such from the files of a folder."""

    index: int
    section: SourceSection
    format: str
    files: tuple[InputFile, ...]
    is_file: bool
    num_bytes: int
    sha256: str
    stamps: tuple[tuple[int, int], ...]  # size and time of change of each file when it was hashed

    @property
    def kind(self) -> DocumentKind:
        """What its documents are."""
        return kind_of(self.format)

    @property
    def is_chat(self) -> bool:
        """Whether its documents are conversations, or samples made of them."""
        return self.kind != "text"

    @property
    def license(self) -> str | None:
        """The licence given in the recipe, or that of the standard library."""
        return self.section.license or (LICENSE if self.format.startswith("stdlib") else None)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the documents, for the fingerprint of the dataset."""
        unread = {"path", "format"}
        if self.kind not in SAMPLE_PARTS:
            unread |= {"chosen_field", "rejected_field", "label_field"}
        section = self.section.model_dump(mode="json", exclude=unread)
        extra = {"generator": GENERATOR_VERSION} if self.format.startswith("stdlib") else {}
        return {"format": self.format, "is_file": self.is_file, "sha256": self.sha256, **section, **extra}


def resolve_sources(sections: Sequence[SourceSection], progress: Progress) -> list[Source]:
    """Find and hash the files of every source. Raises DataError when one has none."""
    if not sections:
        raise DataError(
            "data.sources is empty: there is nothing to read",
            fix="add a source, for example `sources: [{path: texts/}]` or `sources: [{path: stdlib}]`",
        )
    found = [_find(section) for section in sections]
    stamps = [tuple(_stamp(file) for file in files) for _, files, _ in found]
    sizes = [sum(size for size, _ in stamp) for stamp in stamps]
    progress.start("read", sum(sizes))
    sources = []
    for index, (section, (source_format, files, is_file)) in enumerate(zip(sections, found, strict=True)):
        digest = hashlib.sha256()
        for file, (size, _) in zip(files, stamps[index], strict=True):
            digest.update(f"{file.kind}\t{file.id}\t{_content_hash(file.path)}\n".encode())
            progress.advance(size)
        sources.append(
            Source(
                index,
                section,
                source_format,
                tuple(files),
                is_file,
                sizes[index],
                digest.hexdigest(),
                stamps[index],
            )
        )
    progress.finish()
    return sources


def _stamp(file: InputFile) -> tuple[int, int]:
    status = file.path.stat()
    return status.st_size, status.st_mtime_ns


def _content_hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", fix="change its permissions") from error


def check_sources_unchanged(sources: Sequence[Source]) -> None:
    """Raise DataError naming the first file that changed since it was hashed."""
    for source in sources:
        for file, stamp in zip(source.files, source.stamps, strict=True):
            if not file.path.exists() or _stamp(file) != stamp:
                raise DataError(
                    f"{file.path} changed while the dataset was made from it",
                    fix="run it again when nothing writes to the sources",
                )


def _find(section: SourceSection) -> tuple[str, list[InputFile], bool]:
    """Format, files, and whether the path is one file."""
    if section.path in ("stdlib", "stdlib-chat") or section.format in ("stdlib", "stdlib-chat"):
        source_format = section.path if section.path.startswith("stdlib") else section.format
        if section.format in ("stdlib", "stdlib-chat"):
            source_format = section.format
        root = stdlib_root()
        files = [InputFile(path, path.relative_to(root).as_posix(), "stdlib") for path in stdlib_files(root)]
        return source_format, files, False
    root, paths = find_files(section.path)
    if section.format in ("jsonl", "chat", *SAMPLE_PARTS) and len(paths) > 1:
        paths = [path for path in paths if plain_suffix(path) in JSON_SUFFIXES]
        if not paths:
            raise DataError(
                f"{section.path} holds no {', '.join(JSON_SUFFIXES)} files (source format {section.format})",
                fix="name the files themselves, or use format: text",
            )
    files = []
    for path in paths:
        files.append(InputFile(path, path.relative_to(root).as_posix(), _kind(section, path)))
    kinds = {file.kind for file in files}
    special = sorted(kinds - {"text", "json"})
    if special and len(kinds) > 1:
        mine = next(file.id for file in files if file.kind == special[0])
        other = next(file.id for file in files if file.kind != special[0])
        what = "conversations" if special[0] == "chat" else special[0]
        raise DataError(
            f"{section.path} mixes {what} ({mine}) with other text ({other})",
            fix=f"make them two sources, with format: {special[0]} and format: text or jsonl",
        )
    source_format = "jsonl" if min(kinds) == "json" else str(min(kinds))
    return source_format, files, Path(section.path).expanduser().is_file()


def _kind(section: SourceSection, path: Path) -> Kind:
    match section.format:
        case "text":
            return "text"
        case "jsonl":
            return "json"
        case "chat" | "preference" | "feedback" | "prompts":
            return section.format
    if plain_suffix(path) not in JSON_SUFFIXES:
        return "text"
    first = next((data for _, data in _rows(path)), b"{}")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        row = None  # the parser reports the line
    row = row if isinstance(row, dict) else {}
    if section.response_field is None and {section.chosen_field, section.rejected_field} <= row.keys():
        return "preference"
    if section.prompt_field or section.response_field or isinstance(row.get(section.messages_field), list):
        return "chat"
    return "json"


def read_raw(source: Source) -> Iterator[RawDocument]:
    """The raw documents of a source, in order."""
    if source.format == "stdlib-chat":
        yield from _read_questions(source)
        return
    for file in source.files:
        match file.kind:
            case "stdlib":
                name = module_name(Path(file.id))
                yield RawDocument(source.index, "stdlib", name, "", file.path.read_bytes(), str(file.path))
            case "text":
                yield from _read_text(source, file)
            case _:
                # The split follows the content of a row, so that rows may be inserted above it.
                for number, data in _rows(file.path):
                    row_id = f"{file.id}:{number}"
                    yield RawDocument(source.index, file.kind, row_id, "", data, f"{file.path}:{number}")


def _read_text(source: Source, file: InputFile) -> Iterator[RawDocument]:
    size = FILE_SECTION_BYTES if source.is_file else FOLDER_SECTION_BYTES
    group = "" if source.is_file else file.id
    with open_binary(file.path) as stream:
        pending: tuple[int, bytes] | None = None
        number = 0
        for section in read_sections(stream, size):
            if pending is not None:
                yield _section(source, file, group, pending, f"#{number}")
                number += 1
            pending = section
        if pending is None:
            pending = (0, b"")
        yield _section(source, file, group, pending, f"#{number}" if number else "")


def _section(
    source: Source, file: InputFile, group: str, section: tuple[int, bytes], suffix: str
) -> RawDocument:
    offset, data = section
    return RawDocument(source.index, "text", file.id + suffix, group, data, str(file.path), offset)


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Rows of a JSONL file (line number from 1) or of a JSON file that holds a list (position from 1)."""
    if plain_suffix(path) == ".json":
        with open_binary(path) as stream:
            text = stream.read()
        if text.lstrip()[:1] == b"[":
            yield from _list_rows(path, text)
            return
    with open_binary(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line


def _list_rows(path: Path, text: bytes) -> Iterator[tuple[int, bytes]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}", fix="correct the file, or use JSONL") from error
    for number, row in enumerate(rows, start=1):
        yield number, json.dumps(row).encode()


@functools.lru_cache(maxsize=2)
def _questions(files: tuple[InputFile, ...]) -> tuple[tuple[str, str, bytes], ...]:
    """(id, group, JSON row) of every question about the modules in ``files``; parsing them takes seconds."""
    modules = []
    for file in files:
        try:
            module = parse_module(module_name(Path(file.id)), decode_source(file.path.read_bytes()))
        except (SyntaxError, UnicodeDecodeError):
            continue
        if module is not None:
            modules.append(module)
    return tuple(
        (item.id, stdlib_group(item.module), json.dumps({"messages": item.messages}).encode())
        for item in make_questions(modules)
    )


def stdlib_group(module: str) -> str:
    """What the split keeps together: the source, docs and questions of one module."""
    return f"stdlib:{module}"


def _read_questions(source: Source) -> Iterator[RawDocument]:
    for question_id, group, data in _questions(source.files):
        yield RawDocument(source.index, "chat", question_id, group, data, f"stdlib-chat:{question_id}")


def read_batches(sources: Iterable[Source]) -> Iterator[list[RawDocument]]:
    """Raw documents of all sources in batches of about BATCH_BYTES; the batches depend on the data alone."""
    batch: list[RawDocument] = []
    size = 0
    for source in sources:
        for document in read_raw(source):
            batch.append(document)
            size += len(document.data)
            if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
