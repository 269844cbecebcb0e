"""Checkpoints that are whole or absent.

    step-00000123.tmp/   tensors as safetensors, state.json, then manifest.json with the SHA-256 of each
    fsync of every file and of the folder → rename to step-00000123/ → fsync of the parent
    `latest` (and `best`) rewritten by rename → old ones pruned

Nothing is pickled. A reader verifies every hash, and falls back to the newest checkpoint that verifies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hearth.errors import IntegrityError, NotFoundError, StorageError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_REPLACED = ".old.tmp"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: groups of tensors by name, and JSON-able values."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """``step-000123``."""
    return f"step-{step:06d}"


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    """Replace a small file by rename, durably."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync(path.parent)


class CheckpointStore:
    """The checkpoints of one run, under ``RUN/checkpoints``, with ``RUN/latest`` and ``RUN/best``."""

    def __init__(
        self, run_dir: Path, *, keep: int = 2, warn: Callable[[str], None] = lambda _message: None
    ) -> None:
        self.run_dir = run_dir
        self.root = run_dir / "checkpoints"
        self.keep = max(2, keep)
        self._warn = warn

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        best: bool = False,
    ) -> Path:
        """Commit a checkpoint and return its directory.

        Raises StorageError when the disk is full or fails; the unfinished directory is removed and the
        previous checkpoint and ``latest`` are as they were.
        """
        final = self.root / checkpoint_name(step)
        temporary = final.with_name(final.name + ".tmp")
        needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self._write(temporary, step, tensors, state)
            replaced = final.with_name(final.name + _REPLACED)
            if final.exists():  # of an earlier attempt at this very step
                final.rename(replaced)
            temporary.rename(final)
            _fsync(self.root)
            _write_text(self.run_dir / "latest", final.name + "\n")
            if best:
                _write_text(self.run_dir / "best", final.name + "\n")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._restore_replaced()
            raise self._storage_error(final, needed, error) from error
        self.prune()
        return final

    def _write(
        self,
        directory: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
    ) -> None:
        for group, values in tensors.items():
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in values.items()},
                directory / f"{group}.safetensors",
            )
        (directory / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        files = sorted(path for path in directory.iterdir())
        manifest = {
            "format": FORMAT,
            "step": step,
            "files": {
                path.name: {"sha256": _hash_file(path), "bytes": path.stat().st_size} for path in files
            },
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*files, directory / MANIFEST, directory]:
            _fsync(path)

    def _storage_error(self, final: Path, needed: int, error: Exception) -> StorageError:
        free = 0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.run_dir).free
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error)
        what = "the disk is full" if full or free < needed else str(error)
        return StorageError(
            f"cannot write checkpoint {final}: {what} ({needed} bytes needed, {free} free)",
            fix="free space; earlier checkpoints are intact, and the run resumes from the newest of them",
        )

    def _restore_replaced(self) -> None:
        """Put back a checkpoint that was moved aside for one of the same step that never came."""
        for path in self.root.glob(f"*{_REPLACED}"):
            final = path.with_name(path.name.removesuffix(_REPLACED))
            if not final.exists():
                path.rename(final)

    def prune(self) -> None:
        """Keep the newest ``keep`` checkpoints and the best one; remove unfinished ones."""
        protected = {path.name for path in self.list()[: self.keep]}
        protected |= {name for name in (self._pointer("best"), self._pointer("latest")) if name}
        for path in self.root.iterdir():
            finished = _NAME.fullmatch(path.name)
            if path.name.endswith(".tmp") or (finished and path.name not in protected):
                shutil.rmtree(path, ignore_errors=True)

    def discard_after(self, step: int) -> None:
        """Remove checkpoints of later steps: the run goes on from ``step`` and will write them again."""
        for path in self.list():
            if int(path.name.partition("-")[2]) > step:
                shutil.rmtree(path, ignore_errors=True)
                for pointer in ("best", "latest"):
                    if self._pointer(pointer) == path.name:
                        (self.run_dir / pointer).unlink(missing_ok=True)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────

    def list(self) -> list[Path]:
        """Committed checkpoints, newest first. Whether their bytes are sound is known after ``verify``."""
        if not self.root.is_dir():
            return []
        found = [path for path in self.root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)

    def _pointer(self, name: str) -> str | None:
        try:
            return (self.run_dir / name).read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError):
            return None

    def best(self) -> Path | None:
        """The checkpoint with the lowest evaluation loss."""
        name = self._pointer("best")
        path = self.root / name if name and _NAME.fullmatch(name) else None
        return path if path is not None and path.is_dir() else None

    def verify(self, path: Path) -> None:
        """Compare size and SHA-256 of every file with the manifest. Raises IntegrityError."""
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            files = manifest["files"]
            if manifest["format"] != FORMAT:
                raise IntegrityError(f"checkpoint {path} has format {manifest['format']}, not {FORMAT}")
            for name, facts in files.items():
                file = path / name
                size = file.stat().st_size
                if size != facts["bytes"]:
                    raise IntegrityError(f"{file} has {size} bytes, its manifest says {facts['bytes']}")
                if _hash_file(file) != facts["sha256"]:
                    raise IntegrityError(f"{file} does not match the SHA-256 of its manifest")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"checkpoint {path} cannot be verified: {error}") from error

    def load(self, path: Path) -> Checkpoint:
        """Verify one checkpoint and read it. Raises IntegrityError."""
        self.verify(path)
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        groups = [name for name in manifest["files"] if name.endswith(".safetensors")]
        return Checkpoint(
            path=path,
            step=int(manifest["step"]),
            tensors={name.removesuffix(".safetensors"): load_file(path / name) for name in groups},
            state=json.loads((path / STATE).read_text(encoding="utf-8")),
        )

    def load_newest(self) -> Checkpoint:
        """The newest checkpoint that verifies; what had to be passed over is reported through ``warn``.

        Raises NotFoundError when there is none at all, IntegrityError when none verifies.
        """
        self._restore_replaced()
        candidates = self.list()
        if not candidates:
            raise NotFoundError(
                f"no checkpoint in {self.root}", fix="the run stopped before its first one: start it again"
            )
        for path in candidates:
            try:
                checkpoint = self.load(path)
            except IntegrityError as error:
                self._warn(f"checkpoint {path.name} is damaged and is not used: {error.message}")
                continue
            if path is not candidates[0]:
                self._warn(f"going on from the older checkpoint {path.name}")
            return checkpoint
        raise IntegrityError(f"none of the {len(candidates)} checkpoints in {self.root} verifies")
