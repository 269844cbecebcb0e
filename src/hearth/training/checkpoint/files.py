"""The files of a checkpoint: each byte is hashed on its way to the disk, none is read again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hearth.errors import IntegrityError
from hearth.models.loading import SAFETENSORS_DTYPES
from hearth.training.checkpoint.sharded import group_of

MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = ".safetensors"
FORMAT = 2

# Large enough that writing and hashing run outside Python's lock, small enough to be cancelled soon.
_CHUNK_BYTES = 4 << 20

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class WriteCancelledError(Exception):
    """The writer was told to give up; never seen outside this package."""


@dataclass(frozen=True)
class FileFacts:
    """What the manifest knows of a file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    ``metrics`` are those of the evaluation at this step, if there was one.
    """

    step: int
    files: dict[str, FileFacts]
    metrics: dict[str, float]

    def groups(self) -> dict[str, list[str]]:
        """Names of the groups of tensors, each with its files."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.files):
            if name.endswith(TENSORS):
                found.setdefault(group_of(name.removesuffix(TENSORS)), []).append(name)
        return found


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON, with the SHA-256 of itself, so that no byte of it can change unseen."""
    body: dict[str, Any] = {"format": FORMAT, **asdict(manifest)}
    plain = json.dumps(body, indent=1, sort_keys=True).encode()
    body["sha256"] = hashlib.sha256(plain).hexdigest()
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint. Raises IntegrityError unless every byte is as it was written."""
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
        body = json.loads(raw)
        if body["format"] != FORMAT:
            raise IntegrityError(f"checkpoint {directory} has format {body['format']}, not {FORMAT}")
        files = {str(name): FileFacts(**facts) for name, facts in body["files"].items()}
        manifest = Manifest(int(body["step"]), files, dict(body["metrics"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"checkpoint {directory} has no readable {MANIFEST}: {error}") from error
    if encode_manifest(manifest) != raw:
        raise IntegrityError(f"{path} does not match the SHA-256 in itself")
    return manifest


class HashingFile:
    """A new file that hashes what is written to it; closing flushes it to the disk."""

    def __init__(self, path: Path, cancelled: Callable[[], bool]) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._cancelled = cancelled
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write and hash. Raises OSError, and WriteCancelledError once the writer should give up."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            if self._cancelled():
                raise WriteCancelledError
            part = view[start : start + _CHUNK_BYTES]
            self._file.write(part)
            self._digest.update(part)
            self._size += len(part)

    def finish(self) -> FileFacts:
        """Make it durable; its hash and size."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileFacts(self._digest.hexdigest(), self._size)

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def never() -> bool:
    """Whether a writer that nobody cancels should give up."""
    return False


def write_bytes(path: Path, data: bytes, cancelled: Callable[[], bool] = never) -> FileFacts:
    """Write a small file durably."""
    with HashingFile(path, cancelled) as file:
        file.write(data)
        return file.finish()


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    cancelled: Callable[[], bool] = never,
    metadata: Mapping[str, str] | None = None,
) -> FileFacts:
    """Write tensors as a safetensors file in one pass, without a copy of those that are already on the host.

    The library's own writer copies every tensor into a bytes object first, and holds Python's lock meanwhile.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps all aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with HashingFile(path, cancelled) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            host = tensors[name].detach().cpu().contiguous()
            file.write(host.reshape(-1).view(torch.uint8).numpy().data)
        return file.finish()


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_directory(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file by rename, durably."""
    temporary = path.with_name(path.name + ".tmp")
    write_bytes(temporary, text.encode())
    temporary.replace(path)
    fsync_directory(path.parent)
