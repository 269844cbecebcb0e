"""The checkpoints of one run on the disk: commit, choose, verify, prune.

With several processes each writes and hashes its own parts into the same ``.tmp`` folder, which all of them
see, and the first gathers their facts and commits; a file is then called ``GROUP-RANK-of-SIZE.safetensors``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hearth.errors import IntegrityError, NotFoundError, StorageError
from hearth.training.checkpoint.files import (
    MANIFEST,
    STATE,
    TENSORS,
    FileFacts,
    Manifest,
    encode_manifest,
    fsync_directory,
    hash_file,
    never,
    read_manifest,
    replace_text,
    write_bytes,
    write_tensors,
)
from hearth.training.checkpoint.sharded import PLACES, Place, ShardedTensors, encode_places, file_stem
from hearth.training.checkpoint.together import Alone, Together, in_all, in_first

_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = ".tmp"
_REPLACED = ".old.tmp"
_SET_ASIDE = ".damaged"


class _Groups(Mapping[str, Mapping[str, Tensor]]):
    """Groups of tensors that are read when they are asked for; a group without tensors is empty."""

    def __init__(self, directory: Path, files: dict[str, list[str]]) -> None:
        self._directory, self._files = directory, files

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        return ShardedTensors([self._directory / file for file in self._files.get(name, ())])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified: groups of tensors by name, and JSON values."""

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """What this process is to write; nobody changes it any more.

    ``places``: of tensors that are a part of a larger one, its shape and where in it they begin.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: bytes
    metrics: dict[str, float] = field(default_factory=dict)
    best: bool = False
    places: Mapping[str, Mapping[str, Place]] = field(default_factory=dict)

    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for group in self.tensors.values() for t in group.values())


def encode_state(state: Mapping[str, Any]) -> bytes:
    """The values of a checkpoint as JSON. Raises ValueError for a number that is not finite."""
    return json.dumps(state, indent=1, allow_nan=False).encode()


def checkpoint_name(step: int) -> str:
    """``step-000123``."""
    return f"step-{step:06d}"


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint is called after."""
    return int(path.name.partition("-")[2])


class CheckpointStore:
    """The checkpoints of one run, under ``RUN/checkpoints``, with ``RUN/latest`` and ``RUN/best``."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int = 2,
        warn: Callable[[str], None] = lambda _message: None,
        together: Together | None = None,
    ) -> None:
        self._together = together or Alone()
        self.run_dir = run_dir
        self.root = run_dir / "checkpoints"
        self.keep = max(2, keep)
        self._warn = warn
        self._sound: dict[str, dict[str, FileFacts]] = {}  # what this process wrote or verified

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        best: bool = False,
    ) -> Path:
        """Commit a checkpoint now and return its directory; see ``commit``."""
        return self.commit(Snapshot(step, tensors, encode_state(state), dict(metrics or {}), best))

    def commit(self, snapshot: Snapshot, cancelled: Callable[[], bool] = never) -> Path:
        """Write a checkpoint and commit it; its directory.

        Raises StorageError when the disk is full or fails; the unfinished directory is removed and the
        previous checkpoint and ``latest`` are as they were. Once ``cancelled`` says so, gives up in the same
        way with WriteCancelledError.
        """
        final = self.root / checkpoint_name(snapshot.step)
        temporary = final.with_name(final.name + _UNFINISHED)
        together = self._together
        try:
            needed = sum(together.gather(snapshot.num_bytes()))
            in_first(together, lambda: self._begin(temporary, needed))
            parts = in_all(together, lambda: write_snapshot(temporary, snapshot, cancelled, together))
            files = {name: facts for part in parts for name, facts in part.items()}
            in_first(together, lambda: self._finish(temporary, final, snapshot, files))
        except OSError as error:
            self._clean_up(temporary)
            raise self._storage_error(final, snapshot.num_bytes(), error) from error
        except BaseException:  # told to give up, or Ctrl-C
            if together.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if together.rank == 0:
            self.prune()
        return final

    def _begin(self, temporary: Path, needed: int) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._require_space(needed)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def _finish(self, temporary: Path, final: Path, snapshot: Snapshot, files: dict[str, FileFacts]) -> None:
        self._commit_files(temporary, final, Manifest(snapshot.step, files, snapshot.metrics))
        replace_text(self.run_dir / "latest", final.name + "\n")
        if snapshot.best:
            replace_text(self.run_dir / "best", final.name + "\n")

    def _clean_up(self, temporary: Path) -> None:
        if self._together.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._restore_replaced()

    def _commit_files(self, temporary: Path, final: Path, manifest: Manifest) -> None:
        write_bytes(temporary / MANIFEST, encode_manifest(manifest))
        fsync_directory(temporary)
        replaced = final.with_name(final.name + _REPLACED)
        if final.exists():  # of an earlier attempt at this very step
            final.rename(replaced)
        temporary.rename(final)
        fsync_directory(self.root)
        self._sound[final.name] = manifest.files

    def _require_space(self, needed: int) -> None:
        """A disk that is too small is known before half a checkpoint has filled it."""
        if shutil.disk_usage(self.root).free < needed:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _storage_error(self, final: Path, needed: int, error: OSError) -> StorageError:
        free = 0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.run_dir).free
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else (error.strerror or str(error))
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

    # ── keeping ──────────────────────────────────────────────────────────────────────────────────────────

    def prune(self) -> None:
        """Keep the newest ``keep`` sound checkpoints, the best and the latest; remove unfinished ones.

        What this process has neither written nor verified is verified before anything older is given up for
        it, so that there are never fewer than ``keep`` sound ones while there were as many.
        """
        protected = {name for name in (self._pointer("best"), self._pointer("latest")) if name}
        found = self.list()
        num_sound = 0
        for path in found:
            if num_sound < self.keep:
                protected.add(path.name)
                num_sound += self._is_sound(path)
        for path in self.root.iterdir():
            finished = _NAME.fullmatch(path.name)
            superseded = path.name.endswith(_SET_ASIDE) and num_sound >= self.keep
            if path.name.endswith(_UNFINISHED) or superseded or (finished and path.name not in protected):
                self._sound.pop(path.name, None)
                _remove(path)

    def _is_sound(self, path: Path) -> bool:
        """Whether a checkpoint verifies. The bytes of one are read once in a process, then its sizes."""
        files = self._sound.get(path.name)
        try:
            if files is None:
                self._sound[path.name] = self.verify(path).files
            elif any((path / name).stat().st_size != facts.bytes for name, facts in files.items()):
                raise IntegrityError(f"a file of {path} has another size than when it was written")
        except (IntegrityError, OSError) as error:
            self._sound.pop(path.name, None)
            self._warn(f"checkpoint {path.name} is damaged and an older one is kept in its place: {error}")
            return False
        return True

    def resume_from(self, step: int, *, best_step: int = 0) -> None:
        """Make ``step`` the newest: later checkpoints, which are damaged, and the pointers to them go.

        ``best_step``: the best as the checkpoint of ``step`` knows it; a process that was killed after it had
        committed a best one may have left the pointer at the one before. What is damaged stays as
        ``step-N.damaged`` until there are new ones.
        """
        for path in self.list():
            if checkpoint_step(path) > step:
                aside = path.with_name(path.name + _SET_ASIDE)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                self._sound.pop(path.name, None)
        for pointer, target in (("latest", step), ("best", best_step)):
            if (self.root / checkpoint_name(target)).is_dir():
                replace_text(self.run_dir / pointer, checkpoint_name(target) + "\n")
            else:
                (self.run_dir / pointer).unlink(missing_ok=True)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────

    def list(self) -> list[Path]:
        """Committed checkpoints, newest first. Whether their bytes are sound is known after ``verify``."""
        if not self.root.is_dir():
            return []
        found = [path for path in self.root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=checkpoint_step, reverse=True)

    def _pointer(self, name: str) -> str | None:
        try:
            return (self.run_dir / name).read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError):
            return None

    def best(self) -> Path | None:
        """The checkpoint of the best evaluation."""
        name = self._pointer("best")
        path = self.root / name if name and _NAME.fullmatch(name) else None
        return path if path is not None and path.is_dir() else None

    def verify(self, path: Path, together: Together | None = None) -> Manifest:
        """Compare size and SHA-256 of every file with the manifest. Raises IntegrityError.

        ``together``: processes that share the files out among them, and all raise what one has found.
        """
        where = together or Alone()
        manifest = in_all(where, lambda: read_manifest(path))[0]
        own = sorted(manifest.files)[where.rank :: where.size]
        in_all(where, lambda: _compare(path, {name: manifest.files[name] for name in own}))
        return manifest

    def load(self, path: Path, together: Together | None = None) -> Checkpoint:
        """Verify one checkpoint and open it. Raises IntegrityError. ``together``: as in `verify`."""
        manifest = self.verify(path, together)
        if checkpoint_step(path) != manifest.step:
            raise IntegrityError(f"{path} holds the checkpoint of step {manifest.step}")
        self._sound[path.name] = manifest.files
        where = together or Alone()
        state = in_all(where, lambda: _read_state(path))[where.rank]
        return Checkpoint(path, manifest.step, _Groups(path, manifest.groups()), state, manifest.metrics)

    def find(self, which: int | str) -> Checkpoint:
        """The checkpoint of a step, the ``best``, or the ``latest`` that verifies. Only reads.

        Raises NotFoundError, and IntegrityError for a damaged one that was asked for by name.
        """
        if which == "latest":
            return self._newest()
        path = self.best() if which == "best" else self.root / checkpoint_name(int(which))
        if path is None or not path.is_dir():
            steps = ", ".join(str(checkpoint_step(found)) for found in reversed(self.list()))
            what = "best checkpoint, as nothing was evaluated" if which == "best" else f"step {which}"
            raise NotFoundError(
                f"{self.root} has no {what}", fix=f"it has steps {steps}" if steps else "it is empty"
            )
        return self.load(path)

    def load_newest(self) -> Checkpoint:
        """The newest checkpoint that verifies; what had to be passed over is reported through ``warn``.

        All processes of the store must ask. Raises NotFoundError when there is none at all, IntegrityError
        when none verifies.
        """
        in_first(self._together, self._restore_replaced)
        return self._newest(self._together)

    def _newest(self, together: Together | None = None) -> Checkpoint:
        candidates = in_first(together or Alone(), self.list)
        if not candidates:
            raise NotFoundError(
                f"no checkpoint in {self.root}", fix="the run stopped before its first one: start it again"
            )
        for path in candidates:
            try:
                checkpoint = self.load(path, together)
            except IntegrityError as error:
                self._warn(f"checkpoint {path.name} is damaged and is not used: {error.message}")
                continue
            if path is not candidates[0]:
                self._warn(f"going on from the older checkpoint {path.name}")
            return checkpoint
        raise IntegrityError(
            f"none of the {len(candidates)} checkpoints in {self.root} verifies",
            fix=f"start a new run with its recipe: hearth train {self.root.parent / 'recipe.yaml'}",
        )


def write_snapshot(
    directory: Path,
    snapshot: Snapshot,
    cancelled: Callable[[], bool] = never,
    together: Together | None = None,
) -> dict[str, FileFacts]:
    """Write the files of this process durably, and return what the manifest must say of them."""
    where = together or Alone()
    files = {}
    for group, tensors in snapshot.tensors.items():
        if not tensors:
            continue
        name = f"{file_stem(group, where.rank, where.size)}{TENSORS}"
        places = snapshot.places.get(group)
        metadata = {PLACES: encode_places(places)} if places else None
        files[name] = write_tensors(directory / name, tensors, cancelled, metadata)
    if where.rank == 0:
        files[STATE] = write_bytes(directory / STATE, snapshot.state, cancelled)
    return files


def _read_state(directory: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"checkpoint {directory} cannot be read: {error}") from error
    return state


def _compare(directory: Path, files: Mapping[str, FileFacts]) -> None:
    try:
        for name, facts in files.items():
            size = (directory / name).stat().st_size
            if size != facts.bytes:
                raise IntegrityError(f"{directory / name} has {size} bytes, its manifest says {facts.bytes}")
            if hash_file(directory / name) != facts.sha256:
                raise IntegrityError(f"{directory / name} does not match the SHA-256 of its manifest")
    except OSError as error:
        raise IntegrityError(f"checkpoint {directory} cannot be read: {error}") from error


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill on the way leaves a name that is no checkpoint's."""
    doomed = path if path.name.endswith(_UNFINISHED) else path.with_name(path.name + _UNFINISHED)
    with contextlib.suppress(OSError):
        if doomed != path:
            path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
