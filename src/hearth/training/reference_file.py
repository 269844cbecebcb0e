"""The table of reference log-probabilities on disk: one safetensors file with a key and a hash of itself."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hearth.errors import StorageError


@dataclass(frozen=True)
class StoredTables:
    """What was read."""

    key: dict[str, str]
    tables: dict[str, npt.NDArray[np.float64]]


def _digest(key: Mapping[str, str], tables: Mapping[str, npt.NDArray[np.float64]]) -> str:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode())
    for name in sorted(tables):
        digest.update(f"{name} {tables[name].shape}\n".encode() + tables[name].astype("<f8").tobytes())
    return digest.hexdigest()


def write_tables(path: Path, key: Mapping[str, str], tables: Mapping[str, npt.NDArray[np.float64]]) -> None:
    """Write them; ``path`` appears whole, by a rename. Raises StorageError when the disk refuses."""
    content = {name: np.ascontiguousarray(table) for name, table in tables.items()}
    raw = save(content, metadata={"key": json.dumps(dict(key)), "sha256": _digest(key, content)})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write the reference log-probabilities to {path}: {os.strerror(error.errno or 0)}",
            fix="free space on the disk" if error.errno == errno.ENOSPC else None,
        ) from error


def read_tables(path: Path) -> StoredTables | None:
    """The tables of a file, or None when it is damaged."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        key = json.loads(metadata["key"])
    except (SafetensorError, KeyError, ValueError, OSError):
        return None
    if metadata.get("sha256") != _digest(key, tables):
        return None
    return StoredTables(key, tables)
