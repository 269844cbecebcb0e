"""`--on local`: the processes of a job on this machine, watched, and restarted from the last checkpoint."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from hearth.errors import ConfigError, ConflictError
from hearth.parallel.health.watch import Policy
from hearth.parallel.launch.backend import JobStatus, Submitted, Watch
from hearth.parallel.launch.group import LocalGroup, free_port, place_of, require_free
from hearth.parallel.launch.jobs import Job
from hearth.parallel.launch.spec import JobSpec, Rendered
from hearth.parallel.launch.supervise import Group, Outcome, Patience, StopRequest, supervise
from hearth.workspace.processes import ProcessIdentity

# What each process runs before the arguments of the job.
START = (sys.executable, "-m", "hearth.parallel.launch.start")
# Processes that are simply started have no limits and no queue.
RUNS_HERE_UNUSED = frozenset(
    ("--cpus-per-node", "--memory-per-node", "--time-limit", "--image", "--no-requeue")
)
WATCH_OPTIONS = {
    "hang-seconds": "silence of a process while training that means it hangs (300)",
    "quiet-seconds": "silence before the first step, and while saving or evaluating (1800)",
    "straggler-ratio": "own work of a step over that of the others, above which a process is slow (1.5)",
    "restart-delay": "seconds before the first restart; doubles with each (1)",
}


class LocalBackend:
    """Processes of this machine; ``submit`` returns at their end."""

    name: ClassVar[str] = "local"
    UNUSED: ClassVar[frozenset[str]] = RUNS_HERE_UNUSED
    WORKSPACE: ClassVar[str | None] = None
    OPTIONS: ClassVar[Mapping[str, str]] = {"port": "port of rank 0 (a free one)", **WATCH_OPTIONS}

    def __init__(self, start: Sequence[str] = START) -> None:
        self._start = tuple(start)

    def render(self, spec: JobSpec) -> Rendered:
        """One command, run ``processes`` times with other variables."""
        if spec.nodes != 1:
            raise ConfigError(
                f"--nodes {spec.nodes}: --on local is this machine alone",
                fix="use --on torchrun on each node, or --on slurm, kubernetes, ray or azureml",
            )
        patience_of(spec)
        command = shlex.join([*self._start, *spec.arguments()])
        lines = [f"# {spec.processes} processes with RANK 0 … {spec.processes - 1} run this:"]
        lines += [f"{name}={shlex.quote(value)} \\" for name, value in self._variables(spec).items()]
        return Rendered({"command.sh": "\n".join([*lines, command]) + "\n"})

    def validate(self, spec: JobSpec, rendered: Rendered) -> list[str]:  # noqa: ARG002 - the protocol's
        """That the recipe is there and the port is free."""
        checked = require_recipe(spec)
        if (port := spec.option("port")) is not None:
            require_free(parse_number(port, "port", int))
            checked.append(f"port {port} is free")
        return checked

    def submit(self, spec: JobSpec, rendered: Rendered, watch: Watch) -> Submitted:  # noqa: ARG002
        """Run the job to its end; see `supervise`."""
        directory = Path(spec.job_dir)
        environ = {**os.environ, **self._variables(spec)}
        command = [*self._start, *spec.arguments()]
        fixed = spec.option("port")
        handle: dict[str, Any] = {"launcher": vars(ProcessIdentity.current())}

        def start(attempt: int) -> AbstractContextManager[Group]:
            port = free_port() if fixed is None else int(fixed)
            where = directory / f"attempt-{attempt}"
            group = LocalGroup(command, places(spec, "127.0.0.1", port), directory=where, environ=environ)
            handle.update(pids=list(group.pids.values()), attempt=attempt)
            watch.started(handle)
            return group

        with StopRequest() as stop:
            outcome = supervise(
                start, spec.world_size, directory, patience=patience_of(spec), stop=stop, watch=watch
            )
        return submitted(handle, outcome)

    def status(self, job: Job) -> JobStatus:
        """Whether the launcher still lives; its record says how the job ended when it ended."""
        return launcher_status(job.handle)

    def logs(self, job: Job) -> Iterator[str]:
        """Lines of all ranks, of every start."""
        return job_logs(job.dir)

    def cancel(self, job: Job) -> str:
        """SIGTERM to the launcher, which passes it on: processes finish their step and save."""
        return cancel_launcher(job)

    def _variables(self, spec: JobSpec) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // spec.processes)
        defaults = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
        return {**defaults, **spec.variables()}


def places(spec: JobSpec, address: str, port: int) -> dict[int, dict[str, str]]:
    """Torchrun's variables of every rank of a job."""
    size = {"nodes": spec.nodes, "processes": spec.processes}
    return {rank: place_of(rank, **size, address=address, port=port) for rank in range(spec.world_size)}


def patience_of(spec: JobSpec) -> Patience:
    """How long to wait for what, from the options of a job."""
    given = {name: parse_number(value, name, float) for name, value in spec.options if name in WATCH_OPTIONS}
    policy = Policy(
        hang_seconds=given.get("hang-seconds", Policy.hang_seconds),
        quiet_seconds=given.get("quiet-seconds", Policy.quiet_seconds),
        straggler_ratio=given.get("straggler-ratio", Policy.straggler_ratio),
    )
    return Patience(
        spec.max_restarts, first_delay=given.get("restart-delay", Patience.first_delay), policy=policy
    )


def parse_number(text: str, name: str, kind: type[int] | type[float]) -> Any:
    """A positive number. Raises ConfigError."""
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not 0 < value < float("inf"):
        raise ConfigError(f"--option {name}={text}: no positive {'whole ' if kind is int else ''}number")
    return value


def require_recipe(spec: JobSpec) -> list[str]:
    """Load the recipe as the processes will. Returns what was checked.

    Raises ConfigError, and NotFoundError for a run to resume that is not in the workspace, where that can be
    seen from here.
    """
    from hearth.config import load_recipe
    from hearth.parallel.layout import Layout

    run_dir = _run_to_resume(spec)
    checked = [] if run_dir is None else [f"run {spec.resume} is there"]
    if spec.recipe is not None:
        recipe = load_recipe(spec.recipe, spec.overrides).recipe
    elif run_dir is not None and (run_dir / "recipe.yaml").is_file():
        # The stored recipe is complete; the environment of today must not change it.
        recipe = load_recipe(run_dir / "recipe.yaml", spec.overrides, environ={}).recipe
    else:
        return [*checked, f"the recipe of run {spec.resume} was not, as it cannot be seen from here"]
    layout = Layout.of(recipe.parallel, spec.world_size)
    return [*checked, f"the recipe loads; its layout over {spec.world_size} processes: {layout}"]


def _run_to_resume(spec: JobSpec) -> Path | None:
    """Its folder; None without one, or where the workspace is one that only the processes see."""
    from hearth.workspace import Workspace

    if spec.resume is None or not Path(spec.workspace).is_dir() or not Workspace.exists(spec.workspace):
        return None
    with Workspace.open(spec.workspace) as workspace:
        return workspace.runs.get(spec.resume).dir


def submitted(handle: Mapping[str, Any], outcome: Outcome) -> Submitted:
    """The end of a job that was supervised here."""
    failures = [
        {"attempt": each.attempt, "rank": each.rank, "why": each.why, "step": each.step, "tail": each.tail}
        for each in outcome.failures
    ]
    last = outcome.failures[-1] if outcome.failures and outcome.state == "failed" else None
    detail = "" if last is None else f"rank {last.rank}: {last.why}"
    return Submitted(handle, outcome.state, detail, {"restarts": outcome.restarts, "failures": failures})


def launcher_status(handle: Mapping[str, Any]) -> JobStatus:
    """Of a job whose launcher watches it and writes down how it ends."""
    if "launcher" not in handle:
        return JobStatus("unknown", "it was never started")
    launcher = ProcessIdentity(**handle["launcher"])
    if launcher.system_id != ProcessIdentity.current().system_id:
        return JobStatus("unknown", f"its launcher is process {launcher.pid} on {launcher.host}")
    now = datetime.now(UTC)
    if not launcher.is_alive(now, now):
        return JobStatus("failed", f"its launcher, process {launcher.pid}, is gone")
    return JobStatus("running", f"launched by process {launcher.pid}")


def cancel_launcher(job: Job) -> str:
    """Ask the launcher to stop. Raises ConflictError when it is not a process of this machine."""
    job.require_handle("launcher")
    launcher = ProcessIdentity(**job.handle["launcher"])
    if launcher_status(job.handle).state != "running":
        raise ConflictError(
            f"the launcher of job {job.name}, process {launcher.pid} on {launcher.host}, does not run here",
            fix=f"on {launcher.host}: hearth launch cancel {job.name}",
        )
    os.kill(launcher.pid, signal.SIGTERM)
    return f"asked process {launcher.pid} to stop; the job saves a checkpoint first"


def job_logs(directory: Path) -> Iterator[str]:
    """What each rank wrote, start by start."""
    starts = sorted(directory.glob("attempt-*"), key=lambda path: int(path.name.split("-")[1]))
    for start in starts:
        for path in sorted(start.glob("rank-*.log"), key=lambda path: int(path.stem.split("-")[1])):
            yield f"── {start.name}, {path.stem} ──"
            yield from path.read_text(encoding="utf-8", errors="replace").splitlines()
