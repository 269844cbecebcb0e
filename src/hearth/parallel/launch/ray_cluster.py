"""`--on ray`: an actor for each rank, held together by a placement group, watched as processes here are."""

from __future__ import annotations

import importlib
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from hearth.errors import ConfigError, TrainingError
from hearth.parallel.health.cause import Death
from hearth.parallel.launch.backend import JobStatus, Submitted, Watch
from hearth.parallel.launch.group import LocalGroup, free_port
from hearth.parallel.launch.jobs import Job
from hearth.parallel.launch.local import (
    START,
    WATCH_OPTIONS,
    cancel_launcher,
    job_logs,
    launcher_status,
    patience_of,
    places,
    require_recipe,
    submitted,
)
from hearth.parallel.launch.spec import JobSpec, Rendered
from hearth.parallel.launch.supervise import Group, StopRequest, supervise
from hearth.workspace.processes import ProcessIdentity

_INSTALL = "pip install 'hearth-lm[ray]'"
_LOOK_SECONDS = 0.5  # between two questions to the actors
_ANSWER_SECONDS = 10.0


class RayBackend:
    """Processes on the nodes of a Ray cluster, which share the workspace; ``submit`` returns at their end."""

    name: ClassVar[str] = "ray"
    UNUSED: ClassVar[frozenset[str]] = frozenset(("--time-limit", "--image", "--no-requeue"))
    WORKSPACE: ClassVar[str | None] = None
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "address": "of the cluster (RAY_ADDRESS, else a cluster of this machine alone, for this job)",
        **WATCH_OPTIONS,
    }

    def __init__(self, start: Sequence[str] = START) -> None:
        self._start = tuple(start)

    def render(self, spec: JobSpec) -> Rendered:
        """What Ray is asked for, and what each actor runs."""
        import yaml

        patience_of(spec)
        wanted = {
            "placement_group": {"bundles": _bundles(spec), "strategy": _strategy(spec)},
            "actors": {"count": spec.world_size, "per_bundle": spec.processes, **_share(spec)},
            "command": shlex.join([*self._start, *spec.arguments()]),
            "environment": spec.variables(),
        }
        return Rendered({"ray.yaml": yaml.safe_dump(wanted, sort_keys=False, width=110)})

    def validate(self, spec: JobSpec, rendered: Rendered) -> list[str]:  # noqa: ARG002 - the protocol's
        """That the recipe loads; what the cluster has, only the cluster knows."""
        return require_recipe(spec)

    def submit(self, spec: JobSpec, rendered: Rendered, watch: Watch) -> Submitted:  # noqa: ARG002
        """Run the job to its end, as its driver."""
        ray = _library()
        handle: dict[str, Any] = {"launcher": vars(ProcessIdentity.current())}
        command = [*self._start, *spec.arguments()]
        ray.init(
            address=spec.option("address") or os.environ.get("RAY_ADDRESS"),
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        try:
            placement = _reserve(ray, spec)

            def start(attempt: int) -> AbstractContextManager[Group]:
                directory = Path(spec.job_dir) / f"attempt-{attempt}"
                group = RayGroup(ray, spec, placement, command, directory)
                handle.update(pids=group.pids, attempt=attempt)
                watch.started(handle)
                return group

            with StopRequest() as stop:
                outcome = supervise(
                    start,
                    spec.world_size,
                    Path(spec.job_dir),
                    patience=patience_of(spec),
                    stop=stop,
                    watch=watch,
                )
            return submitted(handle, outcome)
        finally:
            ray.shutdown()

    def status(self, job: Job) -> JobStatus:
        """Whether the driver still lives; its record says how the job ended when it ended."""
        return launcher_status(job.handle)

    def logs(self, job: Job) -> Iterator[str]:
        """Lines of all ranks, of every start."""
        return job_logs(job.dir)

    def cancel(self, job: Job) -> str:
        """SIGTERM to the driver, which passes it on: processes finish their step and save."""
        return cancel_launcher(job)


class RankActor:
    """One process of a job on a node of the cluster; it goes with its actor."""

    def address(self) -> tuple[str, int, list[str]]:
        """Where rank 0 would listen here, and the GPUs that Ray gave this actor."""
        ray = importlib.import_module("ray")
        gpus = [str(each) for each in ray.get_gpu_ids()]
        return str(ray.util.get_node_ip_address()), free_port(), gpus

    def start(self, command: list[str], rank: int, place: dict[str, str], directory: str) -> int:
        """Start the process; returns its id."""
        self._rank = rank
        self._group = LocalGroup(command, {rank: place}, directory=Path(directory), environ=os.environ)
        return self._group.pids[rank]

    def look(self) -> tuple[int | None, list[Death], list[tuple[int, str]]]:
        """Exit code, how it died, and the new lines it wrote."""
        codes, deaths = self._group.exit_codes(), self._group.deaths()
        ended = self._rank in codes
        return codes.get(self._rank), deaths, self._group.new_lines(last=ended)

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of the group of this one process."""
        return getattr(self._group, method)(*arguments)


class RayGroup:
    """The actors of one start of a job, as `supervise` sees them."""

    def __init__(self, ray: Any, spec: JobSpec, placement: Any, command: list[str], directory: Path) -> None:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        self._ray = ray
        share = _share(spec)
        remote = ray.remote(
            num_cpus=share["cpus"], num_gpus=share["gpus"], max_restarts=0, max_task_retries=0
        )(RankActor)
        self._actors = {
            rank: remote.options(
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(
                    placement, placement_group_bundle_index=rank // spec.processes
                )
            ).remote()
            for rank in range(spec.world_size)
        }
        self._codes: dict[int, int] = {}
        self._deaths: dict[int, Death] = {}
        self._lines: list[tuple[int, str]] = []
        self._looked = float("-inf")
        try:
            asked = {rank: actor.address for rank, actor in self._actors.items()}
            found = self._ask(asked, spec.join_timeout)
            if missing := sorted(self._actors.keys() - found.keys()):
                death = self._deaths.get(missing[0])
                words = "no answer" if death is None else death.tail
                raise TrainingError(
                    f"rank {missing[0]} did not start in --join-timeout {spec.join_timeout} s: {words}",
                    fix="see `ray status`, and that Hearth is installed on every node",
                )
            host, port, _ = found[0]
            settled = places(spec, host, port)
            visible = _visible_gpus(spec, {rank: gpus for rank, (_, _, gpus) in found.items()})
            starts = {
                rank: actor.start.remote(
                    command, rank, {**spec.variables(), **visible[rank], **settled[rank]}, str(directory)
                )
                for rank, actor in self._actors.items()
            }
            self.pids = [int(pid) for pid in ray.get(list(starts.values()), timeout=spec.join_timeout)]
        except BaseException:
            self.kill()
            raise

    def exit_codes(self) -> Mapping[int, int]:
        """Of the ranks that have ended; 1 for one whose actor or node is gone."""
        self._look()
        return self._codes

    def deaths(self) -> list[Death]:
        """Those that did not end well."""
        self._look(now=True)
        return list(self._deaths.values())

    def stopped(self) -> list[int]:
        """Ranks whose process somebody stopped."""
        return [rank for found in self._call("stopped").values() for rank in found]

    def stacks(self) -> Mapping[int, str]:
        """Python stacks, asked for on each node."""
        return {rank: text for found in self._call("stacks").values() for rank, text in found.items()}

    def tail(self, rank: int) -> str:
        """The last lines of one rank."""
        return str(self._ask({rank: self._actors[rank].call}, _ANSWER_SECONDS, "tail", rank).get(rank, ""))

    def new_lines(self, *, last: bool = False) -> list[tuple[int, str]]:
        """Lines since the last call."""
        self._look(now=last)
        lines, self._lines = self._lines, []
        return lines

    def signal(self, number: int) -> None:
        """To the process of every rank."""
        self._call("signal", number)

    def kill(self) -> None:
        """End processes, then actors; a process goes with its actor in any case."""
        self._call("kill")
        for actor in self._actors.values():
            self._ray.kill(actor)

    def __enter__(self) -> RayGroup:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.kill()

    def _look(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        alive = {rank: actor.look for rank, actor in self._actors.items() if rank not in self._codes}
        for rank, (code, deaths, lines) in self._ask(alive, _ANSWER_SECONDS).items():
            self._lines += lines
            if code is not None:
                self._codes[rank] = code
            self._deaths.update({death.rank: death for death in deaths})
        self._looked = time.monotonic()

    def _call(self, method: str, *arguments: Any) -> dict[int, Any]:
        methods = {rank: actor.call for rank, actor in self._actors.items() if rank not in self._deaths}
        return self._ask(methods, _ANSWER_SECONDS, method, *arguments)

    def _ask(self, methods: Mapping[int, Any], timeout: float, *arguments: Any) -> dict[int, Any]:
        """Answers by rank. An actor that is gone counts as a death; one that does not answer is left out."""
        asked = {rank: method.remote(*arguments) for rank, method in methods.items()}
        if not asked:
            return {}
        ready, _ = self._ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout)
        answers = {}
        for rank, reference in asked.items():
            if reference in ready:
                try:
                    answers[rank] = self._ray.get(reference)
                except self._ray.exceptions.RayActorError as error:
                    words = f"its Ray actor is gone: {str(error).splitlines()[0]}"
                    self._codes[rank] = 1
                    self._deaths[rank] = Death(rank, time.time(), 1, words)
        return answers


def _library() -> Any:
    try:
        importlib.import_module("ray.exceptions")
        importlib.import_module("ray.util")
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"--on ray needs {error.name}", fix=_INSTALL) from error


def _reserve(ray: Any, spec: JobSpec) -> Any:
    placement = ray.util.placement_group(_bundles(spec), strategy=_strategy(spec))
    try:
        ray.get(placement.ready(), timeout=spec.join_timeout)
    except ray.exceptions.GetTimeoutError:
        ray.util.remove_placement_group(placement)
        there = ray.cluster_resources()
        amounts = ", ".join(f"{there.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
        raise TrainingError(
            f"the Ray cluster gave no {spec.nodes} nodes with {_bundles(spec)[0]} each within "
            f"{spec.join_timeout} s (--join-timeout); in all it has {amounts} on {len(ray.nodes())} nodes",
            fix="ask for fewer nodes or processes, or raise --join-timeout",
        ) from None
    return placement


def _share(spec: JobSpec) -> dict[str, float]:
    """What one process gets of its node."""
    cpus = 1.0 if spec.resources.cpus is None else spec.resources.cpus / spec.processes
    return {"cpus": cpus, "gpus": spec.resources.gpus / spec.processes}


def _bundles(spec: JobSpec) -> list[dict[str, float]]:
    share = _share(spec)
    bundle = {"CPU": share["cpus"] * spec.processes}
    if spec.resources.gpus:
        bundle["GPU"] = float(spec.resources.gpus)
    if spec.resources.memory is not None:
        bundle["memory"] = float(spec.resources.memory * 2**20)
    return [dict(bundle) for _ in range(spec.nodes)]


def _strategy(spec: JobSpec) -> str:
    return "STRICT_SPREAD" if spec.nodes > 1 else "STRICT_PACK"


def _visible_gpus(spec: JobSpec, gpus: Mapping[int, list[str]]) -> dict[int, dict[str, str]]:
    """Every rank of a node sees the GPUs of all, in order: LOCAL_RANK counts them, as with torchrun."""
    found: dict[int, dict[str, str]] = {}
    for rank in gpus:
        first = rank // spec.processes * spec.processes
        on_node = [gpu for each in range(first, first + spec.processes) for gpu in gpus[each]]
        found[rank] = {"CUDA_VISIBLE_DEVICES": ",".join(on_node)} if on_node else {}
    return found
