"""`hearth launch RECIPE --on BACKEND`: start a job of many processes; and status, logs, cancel of a job."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.output import note, print_json, print_table
from hearth.errors import ConfigError, Interrupted, TrainingError

if TYPE_CHECKING:
    from hearth.parallel.launch.backend import Backend, JobStatus, Submitted
    from hearth.parallel.launch.jobs import Job, JobStore
    from hearth.parallel.launch.spec import JobSpec

_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")  # a service in Kubernetes begins with a letter
_MAX_NAME = 40  # clusters add to it, and a name in Kubernetes has at most 63 letters


class _LaunchGroup(click.Group):
    """`launch RECIPE …` starts a job; the first word may also be one of the commands."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["start", *args]
        return super().parse_args(ctx, args)


class _StartCommand(click.Command):
    """The command that needs no name."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        assert ctx.parent is not None
        formatter.write_usage(ctx.parent.command_path, " ".join(self.collect_usage_pieces(ctx)))


@click.group(cls=_LaunchGroup, add_help_option=False)
def launch() -> None:
    """Start a recipe on many processes, here or on a cluster."""


@launch.command(cls=_StartCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--on", default="local", show_default=True, metavar="local|torchrun|slurm|kubernetes|ray|azureml",
    help="Where the processes run.",
)  # fmt: skip
@click.option("--processes", type=int, help="Processes, all on one node.")
@click.option("--nodes", type=int, help="Nodes.")
@click.option("--gpus-per-node", type=int, help="GPUs of a node; each gets a process.")
@click.option(
    "--processes-per-node", type=int, help="Processes of a node; default: one for each GPU, else 1."
)
@click.option("--cpus-per-node", type=click.IntRange(min=1), help="CPU cores of a node.")
@click.option("--memory-per-node", metavar="SIZE", help="Memory of a node, such as 64G.")
@click.option("--time-limit", metavar="TIME", help="Such as 30m, 12h or 2d; before it the run saves.")
@click.option("--image", help="Container image, where the backend runs containers.")
@click.option(
    "--env", "environment", multiple=True, metavar="NAME=VALUE", help="A variable of every process."
)
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="A setting of the backend.")
@click.option("--name", help="Name of the job; default: of the recipe, and random letters.")
@click.option("--workspace", help="The workspace as containers see it.")
@click.option("--resume", metavar="RUN", help="Go on with this run from its newest sound checkpoint.")
@click.option("--max-restarts", type=int, default=3, show_default=True, help="Restarts after failures.")
@click.option(
    "--join-timeout", type=int, default=600, show_default=True, help="Seconds to wait for all nodes to come."
)
@click.option("--no-requeue", is_flag=True, help="Do not queue the job again when its time is over.")
@click.option("--dry-run", is_flag=True, help="Print exactly what would be submitted, check it, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def start(on: str, dry_run: bool, as_json: bool, **given: Any) -> None:
    """Start RECIPE on many processes; KEY=VALUE overrides its settings.

    `--on local` and `--on torchrun` run the job here and end with it; the others submit it and return.
    Then: hearth launch list, status JOB, logs JOB, cancel JOB.

    A process that dies or hangs is named, with its last lines or all stacks; all processes are killed and
    start again from the last checkpoint, at most --max-restarts times. Ctrl-C saves a checkpoint first.
    """
    from hearth.parallel.launch.backend import get_backend
    from hearth.parallel.launch.jobs import JobStore
    from hearth.workspace.workspace import workspace_root

    backend = get_backend(on)
    spec = _spec(backend, **given)
    rendered = backend.render(spec)
    checked = backend.validate(spec, rendered)
    if dry_run:
        if as_json:
            print_json({"job": spec.to_dict(), **rendered.to_dict(), "checked": checked})
            return
        click.echo(rendered.to_text())
        for line in checked:
            note(f"checked: {line}")
        note("nothing was submitted")
        return
    store = JobStore(workspace_root())
    job = store.create(backend.name, spec, rendered)
    note(f"job {job.name}: {spec.world_size} processes, {backend.name}; its folder is {job.dir}")
    _submit(backend, store, job, as_json=as_json)


def _submit(backend: Backend, store: JobStore, job: Job, *, as_json: bool) -> None:
    from hearth.parallel.launch.backend import Watch
    from hearth.parallel.launch.spec import Rendered

    files = {path.name: path.read_text(encoding="utf-8") for path in (job.dir / "rendered").iterdir()}
    commands = backend.render(job.spec).commands

    def started(handle: Any) -> None:
        store.update(job, handle=dict(handle), state="running")

    watch = Watch(log=lambda line: click.echo(line, err=True), note=note, started=started)
    try:
        done = backend.submit(job.spec, Rendered(files, commands), watch)
    except BaseException as error:
        store.update(
            store.get(job.name), state="failed", detail=str(error).splitlines()[0] if str(error) else ""
        )
        raise
    job = store.update(job, handle=dict(done.handle), state=done.state, detail=done.detail)
    _tell_end(job, done, as_json=as_json)


def _tell_end(job: Job, done: Submitted, *, as_json: bool) -> None:
    run = job.run
    facts = {
        "job": job.name,
        "state": job.state,
        "detail": job.detail,
        "handle": job.handle,
        "run": None if run is None else run.id,
        **done.facts,
    }
    if as_json:
        print_json(facts)
    going_on = None if run is None else f"hearth launch --resume {run.id} {_shape(job)}"
    if done.state == "interrupted":
        raise Interrupted(f"job {job.name} was interrupted", fix=going_on and f"go on with: {going_on}")
    if done.state == "failed":
        # torchrun restarts by itself, and does not say how often.
        tries = f" after {done.facts['restarts']} restarts" if "restarts" in done.facts else ""
        raise TrainingError(
            f"job {job.name} failed{tries}: {job.detail}",
            fix=f"read its logs: hearth launch logs {job.name}"
            + (f"; go on with: {going_on}" if going_on else ""),
        )
    if not as_json:
        shown = [("job", job.name), ("state", job.state), ("run", facts["run"])]
        shown += [(key, value) for key, value in job.handle.items() if isinstance(value, str)]
        print_table(("what", ""), [(label, value) for label, value in shown if value])
        if not done.has_ended:
            note(f"hearth launch status {job.name}   hearth launch logs {job.name}")


def _shape(job: Job) -> str:
    """The options that give a job the same processes again."""
    spec = job.spec
    where = "" if job.backend == "local" else f"--on {job.backend} "
    if spec.nodes > 1:
        return f"{where}--nodes {spec.nodes} --processes-per-node {spec.processes} …"
    gpus = f" --gpus-per-node {spec.resources.gpus}" if spec.resources.gpus else ""
    return f"{where}--processes {spec.processes}{gpus}"


def _spec(
    backend: Backend,
    *,
    recipe: str | None,
    overrides: tuple[str, ...],
    processes: int | None,
    nodes: int | None,
    gpus_per_node: int | None,
    processes_per_node: int | None,
    cpus_per_node: int | None,
    memory_per_node: str | None,
    time_limit: str | None,
    environment: tuple[str, ...],
    options: tuple[str, ...],
    name: str | None,
    workspace: str | None,
    no_requeue: bool,
    **rest: Any,
) -> JobSpec:
    from hearth.parallel.launch.spec import JobSpec, Resources, parse_duration, parse_memory, parse_pairs
    from hearth.workspace.workspace import workspace_root

    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        overrides, recipe = (recipe, *overrides), None
    if recipe is not None and not Path(recipe).is_file():
        raise ConfigError(f"there is no recipe {recipe}", fix="give the path of a YAML or TOML file")
    _check_together(backend, processes, nodes, gpus_per_node, processes_per_node, name, workspace)
    each = next((n for n in (processes, processes_per_node, gpus_per_node or None) if n is not None), 1)
    spec = JobSpec(
        name=_checked_name(name, recipe),
        recipe=None if recipe is None else str(Path(recipe).absolute()),
        overrides=overrides,
        workspace=workspace or backend.WORKSPACE or str(workspace_root()),
        nodes=1 if nodes is None else nodes,
        processes=each,
        environment=tuple(parse_pairs(environment, "--env").items()),
        resources=Resources(
            gpus_per_node or 0,
            cpus_per_node,
            None if memory_per_node is None else parse_memory(memory_per_node),
        ),
        time_limit=None if time_limit is None else parse_duration(time_limit),
        requeue=not no_requeue,
        options=tuple(parse_pairs(options, f"--on {backend.name} --option", allowed=backend.OPTIONS).items()),
        **rest,
    )
    _refuse_unused(backend, spec)
    return spec


def _refuse_unused(backend: Backend, spec: JobSpec) -> None:
    """What a backend cannot give is not left out in silence."""
    given = {
        "--image": spec.image is not None,
        "--time-limit": spec.time_limit is not None,
        "--cpus-per-node": spec.resources.cpus is not None,
        "--memory-per-node": spec.resources.memory is not None,
        "--no-requeue": not spec.requeue,
    }
    if unused := [option for option, is_given in given.items() if is_given and option in backend.UNUSED]:
        raise ConfigError(f"--on {backend.name} makes no use of {', '.join(unused)}", fix="leave it out")


def _check_together(
    backend: Backend,
    processes: int | None,
    nodes: int | None,
    gpus_per_node: int | None,
    processes_per_node: int | None,
    name: str | None,
    workspace: str | None,
) -> None:
    """Refuse options that contradict each other."""
    if processes is not None and any(value is not None for value in (nodes, processes_per_node)):
        raise ConfigError(
            "--processes is of a single node",
            fix="give --processes alone, or --nodes with --gpus-per-node or --processes-per-node",
        )
    if gpus_per_node is not None and gpus_per_node < 0:
        raise ConfigError(f"--gpus-per-node {gpus_per_node} is less than 0")
    if backend.name == "torchrun" and name is None and (nodes or 1) > 1:
        raise ConfigError(
            "--on torchrun with several nodes needs --name", fix="give all nodes the same --name"
        )
    if workspace is not None and backend.WORKSPACE is None:
        raise ConfigError(
            f"--workspace is where containers see it; processes of --on {backend.name} see it as we do",
            fix="choose the workspace with HEARTH_HOME",
        )


def _checked_name(name: str | None, recipe: str | None) -> str:
    from hearth.workspace.names import new_id

    if name is None:
        stem = re.sub(r"[^a-z0-9]+", "-", Path(recipe or "resume").stem.lower()).strip("-")
        stem = stem if stem[:1].isalpha() else f"job-{stem}"
        return f"{stem[: _MAX_NAME - 9].rstrip('-')}-{new_id()}"
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise ConfigError(
            f"--name {name!r} cannot name a job",
            fix=f"use at most {_MAX_NAME} lowercase letters and digits, a letter first, with '-' between",
        )
    return name


def _store() -> JobStore:
    from hearth.parallel.launch.jobs import JobStore
    from hearth.workspace.workspace import workspace_root

    return JobStore(workspace_root())


def _status(job: Job) -> JobStatus:
    from hearth.parallel.launch.backend import JobStatus, get_backend

    if _wrote_its_end(job):
        return JobStatus(job.state, job.detail)
    found = get_backend(job.backend).status(job)
    job = _store().get(job.name)  # which may have ended meanwhile
    if _wrote_its_end(job):
        return JobStatus(job.state, job.detail)
    # A job that was asked to end may take its time to save, or not hear.
    if job.state == "cancelled" and found.state not in ("pending", "running"):
        return JobStatus("cancelled", found.detail)
    return found


def _wrote_its_end(job: Job) -> bool:
    from hearth.parallel.launch.spec import ENDED

    return job.state in ENDED - {"cancelled"}


def _as_listed(job: Job) -> Job:
    """The record; of a job whose launcher was killed on this machine it would say for ever that it runs."""
    if "launcher" not in job.handle:
        return job
    found = _status(job)
    return job if found.state == "unknown" else replace(job, state=found.state, detail=found.detail)


@launch.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def list_jobs(as_json: bool) -> None:
    """List the jobs of this workspace, newest first; no cluster is asked how its jobs stand."""
    jobs = [_as_listed(job) for job in _store().list()]
    if as_json:
        print_json([{"job": job.name, **job.to_dict(), "spec": job.spec.to_public_dict()} for job in jobs])
        return
    if not jobs:
        note("no jobs yet; `hearth launch RECIPE` starts one")
        return
    rows = [
        (job.name, job.backend, job.state, job.spec.world_size, _when(job.created), job.run and job.run.id)
        for job in jobs
    ]
    print_table(("job", "on", "state", "processes", "created", "run"), rows)


@launch.command()
@click.argument("job_name", metavar="JOB")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def status(job_name: str, as_json: bool) -> None:
    """Show how the job JOB stands, and the last heartbeat of each of its processes."""
    from hearth.parallel.health.heartbeat import read_beats

    job = _store().get(job_name)
    found = _status(job)
    run = job.run
    beats = [] if run is None else [beat for _, beat in sorted(read_beats(run.dir).items())]
    if as_json:
        facts = {"job": job.name, "on": job.backend, "state": found.state, "detail": found.detail}
        print_json({**facts, "run": run and run.id, "handle": job.handle, "ranks": [vars(b) for b in beats]})
        return
    click.echo(f"{job.name}: {found.state}" + (f", {found.detail}" if found.detail else ""))
    if run is not None:
        click.echo(f"run {run.id}, {run.dir}")
    if beats:
        now = time.time()
        rows = [
            (beat.rank, f"{beat.host}:{beat.pid}", beat.phase, beat.step, f"{now - beat.time:.0f} s ago")
            for beat in beats
        ]
        print_table(("rank", "process", "phase", "step", "heartbeat"), rows)


@launch.command()
@click.argument("job_name", metavar="JOB")
def logs(job_name: str) -> None:
    """Print what the processes of the job JOB have written so far."""
    from hearth.parallel.launch.backend import get_backend

    job = _store().get(job_name)
    for line in get_backend(job.backend).logs(job):
        sys.stdout.write(line + "\n")


@launch.command()
@click.argument("job_name", metavar="JOB")
def cancel(job_name: str) -> None:
    """Stop the job JOB; where the backend allows, it saves a checkpoint first."""
    from hearth.parallel.launch.backend import get_backend
    from hearth.parallel.launch.spec import ENDED

    store = _store()
    job = store.get(job_name)
    found = _status(job)
    if found.state in ENDED:
        note(f"job {job.name} has ended already: {found.state}")
        return
    click.echo(get_backend(job.backend).cancel(job))
    if job.backend not in ("local", "torchrun", "ray"):  # their launchers write down how they end
        store.update(job, state="cancelled")


def _when(seconds: float) -> str:
    return time.strftime("%F %T", time.localtime(seconds))
