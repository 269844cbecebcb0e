"""What every backend can do, and where to find it."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from hearth.errors import ConfigError, TrainingError
from hearth.parallel.launch.jobs import Job
from hearth.parallel.launch.spec import ENDED, JobSpec, Rendered, State

_TOOL_SECONDS = 60.0

# backend -> module:class
BACKENDS = {
    "local": "hearth.parallel.launch.local:LocalBackend",
    "torchrun": "hearth.parallel.launch.torchrun:TorchrunBackend",
    "slurm": "hearth.parallel.launch.slurm:SlurmBackend",
    "kubernetes": "hearth.parallel.launch.kubernetes:KubernetesBackend",
    "ray": "hearth.parallel.launch.ray_cluster:RayBackend",
    "azureml": "hearth.parallel.launch.azureml:AzureBackend",
}


@dataclass(frozen=True)
class Submitted:
    """A job after ``submit``: how to find it again, and its end where the backend waited for that."""

    handle: Mapping[str, Any] = field(default_factory=dict)
    state: State = "pending"
    detail: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state in ENDED


@dataclass(frozen=True)
class JobStatus:
    """How a job stands."""

    state: State
    detail: str = ""


class Backend(Protocol):
    """A way to start a job's processes. ``render`` and ``validate`` touch neither network nor cluster."""

    name: ClassVar[str]
    OPTIONS: ClassVar[Mapping[str, str]]  # settings of its own, with their help
    UNUSED: ClassVar[frozenset[str]]  # options of `hearth launch` that mean nothing to it
    WORKSPACE: ClassVar[str | None]  # where processes see the workspace, if not where we do

    def render(self, spec: JobSpec) -> Rendered:
        """What would be submitted. Raises ConfigError for what this backend cannot do."""

    def validate(self, spec: JobSpec, rendered: Rendered) -> list[str]:
        """Check it offline; returns what was checked, and how, for people. Raises ConfigError."""

    def submit(self, spec: JobSpec, rendered: Rendered, watch: Watch) -> Submitted:
        """Start it. Backends that run the job here return at its end, the others at once."""

    def status(self, job: Job) -> JobStatus:
        """How it stands now."""

    def logs(self, job: Job) -> Iterator[str]:
        """What its processes have written so far, line by line."""

    def cancel(self, job: Job) -> str:
        """End it; returns what was done, in words."""


@dataclass(frozen=True)
class Watch:
    """How a backend that waits for its job reports: lines of processes, notes of its own, its handle."""

    log: Callable[[str], None] = lambda _line: None
    note: Callable[[str], None] = lambda _line: None
    started: Callable[[Mapping[str, Any]], None] = lambda _handle: None


def get_backend(name: str) -> Backend:
    """The backend of this name. Raises ConfigError for an unknown one."""
    if name not in BACKENDS:
        raise ConfigError(f"--on {name!r} is no backend", fix=f"use one of {', '.join(BACKENDS)}")
    module, attribute = BACKENDS[name].split(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend


def run_tool(
    command: Sequence[str], *, what: str, fix: str, stdin: str | None = None, timeout: float = _TOOL_SECONDS
) -> str:
    """Standard output of a cluster's tool such as sbatch.

    Raises ConfigError when it is not on PATH, with ``fix``, and TrainingError with its words when it fails or
    does not answer.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} was not found, which {what} needs", fix=fix)
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise TrainingError(
            f"{command[0]} did not answer within {timeout:g} s", fix="see whether the cluster can be reached"
        ) from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise TrainingError(f"{what} failed: {words}", fix=f"the command was: {' '.join(command)}")
    return done.stdout
