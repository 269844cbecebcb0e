"""Writing a split: token shards, loss-mask bits, offsets, and the provenance of every span.

Files of a split, all little-endian and flat:
    tokens-00000.bin   uint16 or uint32 ids; a document never crosses a shard
    mask-00000.bin     chat: one bit a token, lowest bit first; 1 = counts in the loss
    offsets.bin        int64 [documents + 1], where each document starts, counted over all shards
    parts.bin          int64 [documents, parts], tokens of each part; only where documents have several
    bytes.bin          int64 [documents], UTF-8 bytes of the text
    sources.bin        int32 [documents], position of the source in the manifest
    documents.jsonl    one object a document: source, id, bytes, start, stop; messages of a conversation
    lines.bin          int64 [documents + 1], where each line of documents.jsonl starts
    ids.bin            uint64 [documents, 2], (hash of the id, document), sorted, to find a document by id
"""

from __future__ import annotations

import errno
import hashlib
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hearth.data.manifest import FileRecord, Shard, SplitRecord
from hearth.data.process import TokenResult, record_line
from hearth.errors import StorageError

SHARD_TOKENS = 1 << 26

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a failure of the disk into a StorageError that names the path."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"no space left while writing {path}: {error.strerror}",
                fix="free some space or choose another folder; nothing half-written was left behind",
            ) from error
        if error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}:
            raise StorageError(
                f"cannot write {path}: {error.strerror}", fix="choose a folder that you may write to"
            ) from error
        raise StorageError(
            f"the file system failed while making {path}: {error}",
            fix="choose another folder, or check the disk",
        ) from error


class HashedFile:
    """A file that knows its size and sha256 as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._stream = path.open("wb", buffering=1 << 20)
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        """Append."""
        self._stream.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)

    def abandon(self) -> None:
        """Close without caring what is in it."""
        self._stream.close()

    def close(self) -> FileRecord:
        """Flush to the disk; size and hash of what was written."""
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
        return FileRecord(bytes=self.num_bytes, sha256=self._digest.hexdigest())


class _BitFile:
    """Appends booleans as bits, eight to a byte, lowest first."""

    def __init__(self, path: Path) -> None:
        self._file = HashedFile(path)
        self._rest = np.zeros(0, dtype=np.bool_)

    def write(self, bits: npt.NDArray[np.bool_]) -> None:
        bits = np.concatenate([self._rest, bits])
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]

    def abandon(self) -> None:
        self._file.abandon()

    def close(self) -> FileRecord:
        self._file.write(np.packbits(self._rest, bitorder="little").tobytes())
        return self._file.close()


def id_hash(document_id: str) -> int:
    """64-bit hash under which a document is found by its id."""
    return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "little")


class SplitWriter:
    """Writes one split in the order in which documents are added; ``files`` gets the record of each file."""

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str,
        with_mask: bool,
        num_parts: int = 1,
        files: dict[str, FileRecord],
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        directory.mkdir()
        self._directory, self._files = directory, files
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._with_mask, self._num_parts, self._shard_tokens = with_mask, num_parts, shard_tokens
        self._shards: list[Shard] = []
        self._tokens: HashedFile | None = None
        self._mask: _BitFile | None = None
        self._records = HashedFile(directory / "documents.jsonl")
        self._offsets, self._num_bytes, self._lines = array("q", [0]), array("q"), array("q", [0])
        self._ids, self._sources, self._parts = array("Q"), array("i"), array("q")
        self._num_supervised = 0

    def add(self, result: TokenResult) -> None:
        """Append the documents of a batch."""
        if self._num_parts > 1:
            for lengths in result.part_lengths:
                self._parts.extend(lengths)
        for tokens, mask, num_bytes, record in zip(
            result.tokens, result.masks, result.num_bytes, result.records, strict=True
        ):
            shard = self._open_shard()
            assert self._tokens is not None
            self._tokens.write(tokens.astype(self._dtype).tobytes())
            if self._mask is not None:
                self._mask.write(mask)
            self._num_supervised += int(mask.sum())
            shard.tokens += len(tokens)
            shard.documents += 1
            start = self._offsets[-1]
            self._offsets.append(start + len(tokens))
            self._num_bytes.append(num_bytes)
            self._records.write(record_line(record, num_bytes, start, start + len(tokens)))
            self._lines.append(self._records.num_bytes)
            self._ids.append(id_hash(record["id"]))
            self._sources.append(record["source"])

    def _open_shard(self) -> Shard:
        if self._tokens is not None and self._shards[-1].tokens >= self._shard_tokens:
            self._close_shard()
        if self._tokens is None:
            number = len(self._shards)
            name, mask = f"tokens-{number:05d}.bin", f"mask-{number:05d}.bin"
            self._tokens = HashedFile(self._directory / name)
            self._mask = _BitFile(self._directory / mask) if self._with_mask else None
            self._shards.append(
                Shard(file=name, mask=mask if self._with_mask else None, tokens=0, documents=0)
            )
        return self._shards[-1]

    def _close_shard(self) -> None:
        if self._tokens is not None:
            self._record(self._shards[-1].file, self._tokens.close())
        if self._mask is not None:
            self._record(str(self._shards[-1].mask), self._mask.close())
        self._tokens = self._mask = None

    def _record(self, name: str, record: FileRecord) -> None:
        self._files[f"{self._directory.name}/{name}"] = record

    def _write_array(self, name: str, values: npt.NDArray[np.generic]) -> None:
        file = HashedFile(self._directory / name)
        file.write(values.astype(values.dtype.newbyteorder("<")).tobytes())
        self._record(name, file.close())

    def abandon(self) -> None:
        """Close what is open after a failure; the directory is thrown away."""
        for file in (self._records, self._tokens, self._mask):
            if file is not None:
                file.abandon()

    def close(self) -> SplitRecord:
        """Write the index files; the record of the split for the manifest."""
        self._close_shard()
        self._record("documents.jsonl", self._records.close())
        self._write_array("offsets.bin", np.frombuffer(self._offsets, dtype=np.int64))
        sizes = np.frombuffer(self._num_bytes, dtype=np.int64)
        if self._num_parts > 1:
            lengths = np.frombuffer(self._parts, dtype=np.int64)
            self._write_array("parts.bin", lengths.reshape(-1, self._num_parts))
        self._write_array("bytes.bin", sizes)
        self._write_array("sources.bin", np.frombuffer(self._sources, dtype=np.int32))
        self._write_array("lines.bin", np.frombuffer(self._lines, dtype=np.int64))
        hashes = np.frombuffer(self._ids, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._write_array("ids.bin", np.stack([hashes[order], order.astype(np.uint64)], axis=1))
        return SplitRecord(
            documents=len(sizes),
            tokens=self._offsets[-1],
            bytes=int(sizes.sum()),
            supervised_tokens=self._num_supervised,
            parts=self._num_parts,
            shards=self._shards,
        )
