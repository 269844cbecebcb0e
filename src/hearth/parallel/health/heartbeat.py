"""Heartbeats: each process of a job says in a small file which step it is at; whoever launched it reads them.

The training loop writes them itself, from no thread of its own, so that silence means that the loop is stuck.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

Phase = Literal["starting", "training", "evaluating", "saving", "finishing"]
PHASES: tuple[Phase, ...] = get_args(Phase)

# Where the launcher of a job keeps what its processes are to know; see hearth.parallel.launch.jobs.
JOB_DIR_VARIABLE = "HEARTH_JOB_DIR"
_RUN_FILE = "run.json"


@dataclass(frozen=True)
class Beat:
    """What one process last said. ``time`` is in seconds since the epoch, by its own clock.

    ``step_seconds`` is how long its own work of the last step took. With what it waits for others left out, a
    slow process can be told from those that wait for it.
    """

    rank: int
    pid: int
    host: str
    step: int
    phase: Phase
    time: float
    step_seconds: float | None = None


@dataclass(frozen=True)
class JobRun:
    """The run that a job executes: its id and its folder."""

    id: str
    dir: Path

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is anything to go on from."""
        return (self.dir / "latest").exists()


class Heartbeat:
    """Writes ``RUN_DIR/health/rank-N.json``: at changes of phase, else at most once in ``interval`` seconds.

    heart = Heartbeat(run.dir, run_id=run.id, rank=rank)
    heart.beat(step, "training", step_seconds=seconds)

    Rank 0 also tells the launcher, where there is one, which run to go on with should a process die; before
    that it removes what another job of the same run left, of which some ranks may not exist any more.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        run_id: str,
        rank: int,
        interval: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = run_dir / "health" / f"rank-{rank}.json"
        self._rank = rank
        self._interval = interval
        self._clock = clock
        self._written = float("-inf")
        self._phase: Phase | None = None
        self._host = socket.gethostname()
        # A heartbeat that cannot be written, on a full disk say, must not end the run.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                for path in self._path.parent.glob("*rank-*.json*"):  # also halves, of writers that died
                    path.unlink(missing_ok=True)
        if rank == 0 and (job_dir := os.environ.get(JOB_DIR_VARIABLE)):
            announce_run(Path(job_dir), JobRun(run_id, run_dir))

    def beat(self, step: int, phase: Phase, step_seconds: float | None = None) -> None:
        """Say that this process is at ``step``, of which its own work took ``step_seconds``."""
        assert phase in PHASES, phase
        now = self._clock()
        # A clock that was set back would otherwise silence a healthy process.
        if phase == self._phase and 0 <= now - self._written < self._interval:
            return
        beat = Beat(self._rank, os.getpid(), self._host, step, phase, now, step_seconds)
        with contextlib.suppress(OSError):
            write_atomically(self._path, json.dumps(asdict(beat)))
            self._written, self._phase = now, phase

    @contextlib.contextmanager
    def during(self, step: int, phase: Phase) -> Iterator[None]:
        """Be in ``phase`` for a while, such as for a checkpoint, then again in the one before."""
        before = self._phase or "starting"
        self.beat(step, phase)
        try:
            yield
        finally:
            self.beat(step, before)


def read_beats(run_dir: Path) -> dict[int, Beat]:
    """The last heartbeat of each rank of a run; files that are no heartbeats are left out."""
    found = {}
    for path in (run_dir / "health").glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
            found[beat.rank] = beat
    return found


def announce_run(job_dir: Path, run: JobRun) -> None:
    """Tell the launcher which run its job executes. A folder that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        job_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(job_dir / _RUN_FILE, json.dumps({"id": run.id, "dir": str(run.dir.absolute())}))


def read_run(job_dir: Path) -> JobRun | None:
    """The run that a job executes; None until its processes have begun one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((job_dir / _RUN_FILE).read_text(encoding="utf-8"))
        return JobRun(str(found["id"]), Path(found["dir"]))
    return None


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
