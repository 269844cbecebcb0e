"""Runs: what was executed, with which recipe, how it went, and its metrics as time series."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsFloat

import sqlalchemy as sa

from hearth.errors import ConflictError, InputError, Interrupted, NotFoundError, StorageError
from hearth.workspace.database import Database
from hearth.workspace.names import new_id
from hearth.workspace.processes import ProcessIdentity
from hearth.workspace.schema import metrics, runs, utcnow

Status = Literal["running", "finished", "failed", "interrupted"]
STATUSES: tuple[Status, ...] = ("running", "finished", "failed", "interrupted")

_FLUSH_POINTS = 200  # points that wait in memory before they are written
_FLUSH_SECONDS = 2.0
_HEARTBEAT_SECONDS = 20.0
_MAX_WAITING_POINTS = 100_000  # while the database cannot be written


@dataclass(frozen=True)
class MetricPoint:
    """One value of one series; ``time`` is in seconds since the epoch."""

    step: int
    name: str
    value: float
    time: float


class Run:
    """One execution. The process that created it logs metrics and finishes it; others read.

    Its fields are as they were when it was read; ``status`` is "interrupted" when the record says
    "running" but the process is gone.
    """

    def __init__(self, store: RunStore, row: sa.Row[Any]) -> None:
        self._store = store
        self._recorder: _Recorder | None = None
        self._load(row)

    def _load(self, row: sa.Row[Any]) -> None:
        self.id: str = row.id
        self.kind: str = row.kind
        self.name: str = row.name
        self.recipe: dict[str, Any] | None = row.recipe
        self.recipe_hash: str | None = row.recipe_hash
        self.parent: str | None = row.parent_id
        self.tags: dict[str, str] = row.tags
        self.summary: dict[str, Any] = row.summary
        self.created_at: datetime = row.created_at
        self.finished_at: datetime | None = row.finished_at
        self.host: str = row.host
        self.pid: int = row.pid
        self.status: Status = row.status
        self.error: str | None = row.error
        if row.status == "running":
            owner = ProcessIdentity(row.host, row.system_id, row.pid, row.process_started)
            if not owner.is_alive(row.heartbeat_at, utcnow()):
                self.status = "interrupted"
                self.error = f"its process {row.pid} on {row.host} is gone"

    @property
    def dir(self) -> Path:
        """The run's folder, ``runs/ID`` in the workspace."""
        return self._store.root / self.id

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON."""
        keys = [
            "id",
            "kind",
            "name",
            "status",
            "error",
            "recipe_hash",
            "parent",
            "tags",
            "summary",
            "host",
            "pid",
            "recipe",
        ]
        return {
            **{key: getattr(self, key) for key in keys},
            "dir": str(self.dir),
            "created_at": self.created_at.isoformat(),
            "finished_at": None if self.finished_at is None else self.finished_at.isoformat(),
        }

    def refresh(self) -> Self:
        """Read the record again."""
        self._load(self._store.row(self.id))
        return self

    def log_metrics(self, values: Mapping[str, SupportsFloat], *, step: int) -> None:
        """Record values of one step. They reach the database within two seconds or 200 points, or on flush.

        Raises ConflictError on a run that this process did not create or resume, or that has ended.
        """
        now = time.time()
        points = [MetricPoint(int(step), name, float(value), now) for name, value in values.items()]
        self._own().add(points)

    def flush(self) -> None:
        """Write what waits in memory; do this with every checkpoint."""
        self._own().flush()

    def discard_metrics_after(self, step: int) -> None:
        """Forget points of later steps: a job that resumes at ``step`` will record them again."""
        self._own().flush()
        with self._store.database.write() as connection:
            connection.execute(metrics.delete().where(metrics.c.run_id == self.id, metrics.c.step > step))

    def update_summary(self, summary: Mapping[str, Any]) -> None:
        """Merge into the summary while the run goes on."""
        self.summary = {**self.summary, **summary}
        self._store.update(self.id, summary=self.summary)

    def finish(
        self,
        status: Status = "finished",
        *,
        summary: Mapping[str, Any] | None = None,
        error: str | BaseException | None = None,
    ) -> None:
        """End the run: write the metrics that wait, then status, summary and error."""
        if status not in STATUSES or status == "running":
            raise InputError(f"a run cannot end as {status!r}", fix=f"use one of {', '.join(STATUSES[1:])}")
        recorder = self._own()
        recorder.flush()
        self.status, self.finished_at = status, utcnow()
        self.summary = {**self.summary, **(summary or {})}
        self.error = None if error is None else str(error) or type(error).__name__
        self._store.update(
            self.id, status=status, finished_at=self.finished_at, summary=self.summary, error=self.error
        )
        recorder.stop()
        self._store.release(self)
        self._recorder = None

    def metrics(self, name: str | None = None) -> list[MetricPoint]:
        """The run's series; see ``RunStore.metrics``."""
        return self._store.metrics(self.id, name)

    def _own(self) -> _Recorder:
        if self._recorder is None:
            state = f"has ended ({self.status})" if self.status != "running" else "belongs to another process"
            raise ConflictError(f"run {self.id} {state}", fix="resume it, or create a new run")
        return self._recorder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._recorder is None:
            return
        if error is None:
            self.finish()
        else:
            interrupted = isinstance(error, KeyboardInterrupt | Interrupted)
            self.finish("interrupted" if interrupted else "failed", error=error)

    def __repr__(self) -> str:
        return f"Run({self.id}, {self.kind}, {self.name!r}, {self.status})"


class RunStore:
    """The runs of a workspace."""

    def __init__(self, database: Database, root: Path) -> None:
        self.database = database
        self.root = root
        self._owned: dict[str, Run] = {}
        atexit.register(self.close)

    def create(
        self,
        kind: str,
        *,
        name: str,
        recipe: Mapping[str, Any] | None = None,
        recipe_hash: str | None = None,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Run:
        """Start a run of this process: its record, its folder, its heartbeat."""
        owner = ProcessIdentity.current()
        now = utcnow()
        run_id = new_id()
        row = {
            "id": run_id,
            "kind": kind,
            "name": name,
            "status": "running",
            "recipe": None if recipe is None else dict(recipe),
            "recipe_hash": recipe_hash,
            "parent_id": None if parent is None else self.get(parent).id,
            "tags": dict(tags or {}),
            "summary": {},
            "created_at": now,
            **_owner_columns(owner),
        }
        self._create_folder(self.root / run_id)
        with self.database.write() as connection:
            connection.execute(runs.insert().values(row))
        return self._adopt(self.get(run_id))

    def resume(self, run_id: str) -> Run:
        """Take a run up again in this process. Raises ConflictError while another process executes it."""
        run_id = self.get(run_id).id
        with self.database.write() as connection:
            row = connection.execute(sa.select(runs).where(runs.c.id == run_id).with_for_update()).one()
            if run_id in self._owned or Run(self, row).status == "running":
                raise ConflictError(
                    f"run {run_id} is still running as process {row.pid} on {row.host}",
                    fix="stop that process first",
                )
            values = {"status": "running", "finished_at": None, "error": None}
            connection.execute(
                runs.update()
                .where(runs.c.id == run_id)
                .values(**values, **_owner_columns(ProcessIdentity.current()))
            )
        self._create_folder(self.root / run_id)
        return self._adopt(self.get(run_id))

    def get(self, run_id: str) -> Run:
        """The run with this id, or with the only id that begins so. Raises NotFoundError."""
        return Run(self, self.row(run_id))

    def row(self, run_id: str) -> sa.Row[Any]:
        """The record behind ``get``."""
        with self.database.read() as connection:
            exact = connection.execute(sa.select(runs).where(runs.c.id == run_id)).first()
            if exact is not None:
                return exact
            query = sa.select(runs).where(runs.c.id.startswith(run_id, autoescape=True)).limit(6)
            found = connection.execute(query).all() if run_id else []
        if not found:
            raise NotFoundError(f"no run {run_id!r}", fix="`hearth runs list` shows them")
        if len(found) > 1:
            some = ", ".join(row.id for row in found)
            raise NotFoundError(f"several runs begin with {run_id!r}: {some}", fix="give more of the id")
        return found[0]

    def list(self, kind: str | None = None, status: str | None = None, limit: int | None = None) -> list[Run]:
        """Runs, newest first. ``status`` is the one that is shown: a lost run counts as interrupted."""
        if status is not None and status not in STATUSES:
            raise InputError(f"no run status {status!r}", fix=f"use one of {', '.join(STATUSES)}")
        query = sa.select(runs).order_by(runs.c.created_at.desc(), runs.c.id)
        if kind is not None:
            query = query.where(runs.c.kind == kind)
        if status in ("finished", "failed"):
            query = query.where(runs.c.status == status)
        elif status is not None:
            query = query.where(runs.c.status.in_(("running", "interrupted")))
        with self.database.read() as connection:
            found = [Run(self, row) for row in connection.execute(query)]
        found = [run for run in found if status is None or run.status == status]
        return found if limit is None else found[:limit]

    def metrics(self, run_id: str, name: str | None = None) -> builtins.list[MetricPoint]:
        """The points of one series, or of all, by step and then by when they were logged."""
        query = sa.select(metrics.c.step, metrics.c.name, metrics.c.value, metrics.c.time)
        query = query.where(metrics.c.run_id == self.get(run_id).id).order_by(metrics.c.step, metrics.c.id)
        if name is not None:
            query = query.where(metrics.c.name == name)
        with self.database.read() as connection:
            return [
                MetricPoint(step, series, float("nan") if value is None else value, at)
                for step, series, value, at in connection.execute(query)
            ]

    def update(self, run_id: str, **values: object) -> None:
        """Change columns of a run's record."""
        with self.database.write() as connection:
            connection.execute(runs.update().where(runs.c.id == run_id).values(values))

    def release(self, run: Run) -> None:
        """Forget a run that this process executed."""
        self._owned.pop(run.id, None)

    def close(self) -> None:
        """Write what waits for every run of this process; they stay `running` until their process ends."""
        atexit.unregister(self.close)
        for run in list(self._owned.values()):
            if run._recorder is not None:
                run._recorder.stop()
        self._owned.clear()

    def _adopt(self, run: Run) -> Run:
        run._recorder = _Recorder(self, run.id)
        self._owned[run.id] = run
        return run

    def _create_folder(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot create the run folder {path}: {error.strerror}") from error


def _owner_columns(owner: ProcessIdentity) -> dict[str, object]:
    return {
        "host": owner.host,
        "system_id": owner.system_id,
        "pid": owner.pid,
        "process_started": owner.started,
        "heartbeat_at": utcnow(),
    }


class _Recorder:
    """Buffers the metrics of one run and writes them in batches, with a heartbeat, from a thread."""

    def __init__(self, store: RunStore, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._waiting: list[MetricPoint] = []
        self._lock = threading.Lock()  # guards _waiting
        self._writing = threading.Lock()  # one batch at a time, in order
        self._stopping = threading.Event()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name=f"hearth-run-{run_id}", daemon=True)
        self._thread.start()

    def add(self, points: Sequence[MetricPoint]) -> None:
        with self._lock:
            self._waiting.extend(points)
            count = len(self._waiting)
        if count >= _MAX_WAITING_POINTS:
            self.flush()
        elif count >= _FLUSH_POINTS:
            self._try_flush()

    def flush(self) -> None:
        """Write the buffer; on failure the points stay in it."""
        if os.getpid() != self._pid:  # a forked child: the buffer is its parent's, and so are the locks
            return
        with self._writing:
            with self._lock:
                batch = list(self._waiting)
            if not batch:
                return
            rows = [
                {
                    "run_id": self._run_id,
                    "name": point.name,
                    "step": point.step,
                    "value": None if point.value != point.value else point.value,
                    "time": point.time,
                }
                for point in batch
            ]
            with self._store.database.write() as connection:
                connection.execute(metrics.insert(), rows)
            with self._lock:
                del self._waiting[: len(batch)]

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=10)
        self._try_flush()

    def _try_flush(self) -> None:
        """A database that is busy or full must not stop the work yet; the next flush tries again."""
        with contextlib.suppress(StorageError):
            self.flush()

    def _work(self) -> None:
        beat = time.monotonic()
        while not self._stopping.wait(_FLUSH_SECONDS):
            self._try_flush()
            if time.monotonic() - beat >= _HEARTBEAT_SECONDS:
                beat = time.monotonic()
                try:
                    self._store.update(self._run_id, heartbeat_at=utcnow())
                except StorageError:
                    continue
