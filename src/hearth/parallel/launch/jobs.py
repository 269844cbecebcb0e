"""Jobs that were launched from a workspace: a folder each, so that status, logs and cancel find them.

jobs/NAME/job.json       backend, specification, handle, how it ended
jobs/NAME/run.json       the run it executes, written by its rank 0
jobs/NAME/rendered/      what was submitted
jobs/NAME/attempt-K/     rank-N.log, rank-N.stacks of each start
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hearth.errors import ConflictError, NotFoundError, StorageError
from hearth.parallel.health.heartbeat import JobRun, read_run, write_atomically
from hearth.parallel.launch.spec import ENDED, JobSpec, Rendered, State


@dataclass(frozen=True)
class Job:
    """A launched job, as its record says."""

    dir: Path
    backend: str
    spec: JobSpec
    created: float
    handle: Mapping[str, Any] = field(default_factory=dict)
    state: State = "pending"
    detail: str = ""

    @property
    def name(self) -> str:
        """Its id."""
        return self.spec.name

    @property
    def run(self) -> JobRun | None:
        """The run it executes; None until one has begun."""
        return read_run(self.dir)

    def require_handle(self, key: str) -> str:
        """An entry of the handle. Raises NotFoundError when the job was never submitted."""
        if key not in self.handle:
            raise NotFoundError(
                f"job {self.name} was never submitted", fix="submit it again with hearth launch"
            )
        return str(self.handle[key])

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON."""
        return {
            "backend": self.backend,
            "spec": self.spec.to_dict(),
            "created": self.created,
            "handle": dict(self.handle),
            "state": self.state,
            "detail": self.detail,
        }


class JobStore:
    """The jobs of a workspace."""

    def __init__(self, workspace_root: Path) -> None:
        self.root = workspace_root / "jobs"

    def create(self, backend: str, spec: JobSpec, rendered: Rendered) -> Job:
        """Record a job and what will be submitted."""
        job = Job(self.root / spec.name, backend, spec, time.time())
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._take(job)
            (job.dir / "rendered").mkdir(exist_ok=True)
            for name, text in rendered.files.items():
                (job.dir / "rendered" / name).write_text(text, encoding="utf-8")
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"cannot write the job's folder {job.dir}: {error.strerror}",
                fix="choose a writable workspace with HEARTH_HOME",
            ) from error
        return self.save(job)

    def _take(self, job: Job) -> None:
        """Make the job's folder, which holds variables such as tokens: for its owner alone."""
        try:
            job.dir.mkdir(mode=0o700)
        except FileExistsError:
            # The nodes of one job on torchrun, each of which is told of it, share its folder.
            shares = job.backend == "torchrun" and job.spec.nodes > 1
            before = self._load(job.dir) if (job.dir / "job.json").exists() else None
            if shares and (before is None or before.state not in ENDED):
                return
            of = "" if before is None else f", of {time.ctime(before.created)}"
            raise ConflictError(
                f"there is a job {job.name} already{of}", fix="choose another --name, or leave it out"
            ) from None

    def save(self, job: Job) -> Job:
        """Write the record."""
        write_atomically(job.dir / "job.json", json.dumps(job.to_dict(), indent=2))
        return job

    def update(self, job: Job, **changes: Any) -> Job:
        """Change fields of the record."""
        return self.save(replace(job, **changes))

    def list(self) -> list[Job]:
        """All jobs, newest first."""
        found = [self._load(path.parent) for path in self.root.glob("*/job.json")]
        return sorted(found, key=lambda job: job.created, reverse=True)

    def get(self, name: str) -> Job:
        """The job of this name, or the only one that begins so. Raises NotFoundError."""
        if name and (self.root / name / "job.json").is_file() and "/" not in name:
            return self._load(self.root / name)
        found = [job for job in self.list() if name and job.name.startswith(name)]
        if len(found) == 1:
            return found[0]
        some = ", ".join(job.name for job in found[:6])
        if found:
            raise NotFoundError(f"several jobs begin with {name!r}: {some}", fix="give more of the name")
        raise NotFoundError(f"no job {name!r} in {self.root}", fix="`hearth launch list` shows them")

    def _load(self, directory: Path) -> Job:
        path = directory / "job.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            spec = JobSpec.from_dict(record.pop("spec"))
            return Job(directory, spec=spec, **record)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StorageError(
                f"the record of a job cannot be read: {path}: {error}", fix=f"remove the folder {directory}"
            ) from error
