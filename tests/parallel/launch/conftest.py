"""Jobs of processes that import no torch."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from hearth.parallel.launch.backend import Submitted, Watch
from hearth.parallel.launch.jobs import Job, JobStore
from hearth.parallel.launch.local import LocalBackend
from hearth.parallel.launch.spec import JobSpec

PROCESS = Path(__file__).with_name("job_process.py")
SOURCES = Path(__file__).resolve().parents[3] / "src"


@dataclass
class Told:
    """What a launcher said while it worked."""

    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    handles: list[dict[str, Any]] = field(default_factory=list)

    @property
    def watch(self) -> Watch:
        return Watch(self.lines.append, self.notes.append, lambda handle: self.handles.append({**handle}))

    @property
    def pids(self) -> list[int]:
        return [pid for handle in self.handles for pid in handle["pids"]]


@pytest.fixture
def told() -> Iterator[Told]:
    """Collects what is said; no process that was told of may be left at the end of the test."""
    said = Told()
    yield said
    assert not [pid for pid in said.pids if psutil.pid_exists(pid)]


@pytest.fixture(autouse=True)
def _sources_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """Also where the tests run as a shell's background job, for which Ctrl-C is switched off."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., JobSpec]:
    """A job in a workspace of its own; options as keywords with underscores."""

    def make(*orders: str, options: dict[str, str] | None = None, **changes: Any) -> JobSpec:
        impatient = {"hang-seconds": "60", "restart-delay": "0.1", **(options or {})}
        given = {"name": "job-1", "recipe": "recipe.yaml", "workspace": str(tmp_path / "ws"), "processes": 2}
        return JobSpec(**{**given, "overrides": orders, "options": tuple(impatient.items()), **changes})

    return make


@pytest.fixture
def launch_local(make_spec: Callable[..., JobSpec], told: Told) -> Callable[..., tuple[Submitted, Job]]:
    """Run a job of test processes to its end on this machine."""

    def launch(*orders: str, **changes: Any) -> tuple[Submitted, Job]:
        spec = make_spec(*orders, **changes)
        backend = LocalBackend((sys.executable, str(PROCESS)))
        rendered = backend.render(spec)
        job = JobStore(Path(spec.workspace)).create("local", spec, rendered)
        return backend.submit(spec, rendered, told.watch), job

    return launch


@pytest.fixture
def bare_spec(make_spec: Callable[..., JobSpec]) -> Callable[..., JobSpec]:
    """The same without the options of backends that watch."""

    def make(*orders: str, options: dict[str, str] | None = None, **changes: Any) -> JobSpec:
        return replace(make_spec(*orders, **changes), options=tuple((options or {}).items()))

    return make
