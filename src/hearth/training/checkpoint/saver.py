"""Saves in the background: a step waits for a copy of the state, a thread writes it.

A thread, not a process: writing, hashing and flushing all run outside Python's lock (measured in
docs/decisions/0031-checkpoints.md), and a process would need the copy in shared memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hearth.training.checkpoint.files import WriteCancelledError
from hearth.training.checkpoint.staging import Stager
from hearth.training.checkpoint.stateful import Contents
from hearth.training.checkpoint.store import CheckpointStore, Snapshot, encode_state


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has been committed."""

    path: Path
    step: int
    seconds: float  # from the request to the commit
    stall_seconds: float  # of them, how long training stood still
    num_bytes: int

    def metrics(self) -> dict[str, float]:
        """What is logged at the step of the checkpoint."""
        return {"checkpoint_seconds": self.seconds, "checkpoint_stall_seconds": self.stall_seconds}


class CheckpointSaver:
    """Writes the checkpoints of a run, at most one at a time.

    ``background``: copy the state and let a thread write it. Otherwise ``save`` returns after the commit.
    ``say`` hears when a save has to wait for the one before it.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        background: bool,
        say: Callable[[str], None] = lambda _message: None,
    ) -> None:
        self.store = store
        self._background = background
        self._say = say
        self._stager = Stager()
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._saved: list[Saved] = []
        self._error: Exception | None = None

    def save(
        self,
        step: int,
        contents: Callable[[], tuple[Contents, Mapping[str, Any]]],
        *,
        metrics: Mapping[str, float] | None = None,
        best: bool = False,
        last: bool = False,
    ) -> None:
        """Save what ``contents`` returns, tensors and other values, as the checkpoint of ``step``.

        Waits first for a save that is still being written. ``last``: nothing changes any more, so that it is
        written at once and without a copy. Raises StorageError when the save before failed, and when this one
        did, unless it is written in the background.
        """
        started = time.perf_counter()
        if self._thread is not None and self._thread.is_alive():
            self._say(f"the checkpoint of step {step} waits for the one before it, which is still written")
        self._join()
        found, values = contents()
        state = encode_state({**values, "parts": found.values})
        background = self._background and not last
        tensors = self._stager.stage(found.tensors) if background else found.tensors
        snapshot = Snapshot(step, tensors, state, dict(metrics or {}), best, found.places)
        if not background:
            path = self.store.commit(snapshot)
            seconds = time.perf_counter() - started
            self._saved.append(Saved(path, step, seconds, seconds, snapshot.num_bytes()))
            return
        stall = time.perf_counter() - started
        # A daemon: it may wait for a process that is lost. Whoever ends in any other way waits for it.
        self._thread = threading.Thread(
            target=self._write,
            args=(snapshot, started, stall),
            name=f"hearth-checkpoint-{step}",
            daemon=True,
        )
        self._thread.start()

    def _write(self, snapshot: Snapshot, started: float, stall: float) -> None:
        try:
            path = self.store.commit(snapshot, self._cancelled.is_set)
        except WriteCancelledError:
            return
        except Exception as error:  # noqa: BLE001 - raised by the next call, in the thread that trains
            self._error = error
            return
        seconds = time.perf_counter() - started
        self._saved.append(Saved(path, snapshot.step, seconds, stall, snapshot.num_bytes()))

    def poll(self) -> list[Saved]:
        """Checkpoints committed since the last call; does not wait. Raises the writer's StorageError."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> list[Saved]:
        """Wait for the save under way; then as ``poll``."""
        self._join()
        return self.poll()

    def cancel(self) -> None:
        """Give up the save under way, and remove what it has written; for one who cannot wait."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
