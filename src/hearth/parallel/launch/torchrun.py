"""`--on torchrun`: torch's launcher on each node, and its command line, which other backends embed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from hearth.errors import ConfigError
from hearth.parallel.health.cause import last_lines
from hearth.parallel.launch.backend import JobStatus, Submitted, Watch
from hearth.parallel.launch.jobs import Job
from hearth.parallel.launch.local import (
    RUNS_HERE_UNUSED,
    cancel_launcher,
    launcher_status,
    require_recipe,
)
from hearth.parallel.launch.spec import JobSpec, Rendered
from hearth.parallel.launch.supervise import StopRequest
from hearth.workspace.lifeline import ask_kernel_to_follow_parent
from hearth.workspace.processes import ProcessIdentity

MODULE = "hearth.parallel.launch.start"
# torchrun kills processes that it told to end after 30 s, which may be less than a checkpoint takes.
SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
# Processes that torchrun starts again would find the addresses of the dead in the store that it shares with
# them (pytorch issue 135712); with this, rank 0 of each start makes a new one.
OWN_STORE_VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
SAVE_SECONDS = 300
_ENDPOINT = re.compile(r"[A-Za-z0-9._-]+:\d{1,5}")
_NOBODY_CAME = re.compile(r"Rendezvous(Timeout|Connection)Error|timed out after|DistNetworkError")
_PORT = 29400
_POLL_SECONDS = 0.2
_TAIL_LINES = 200


def torchrun_arguments(
    spec: JobSpec, *, endpoint: str, rendezvous: str = "c10d", node_rank: str | None = None
) -> list[str]:
    """The arguments of `torchrun` on one node; ``endpoint`` (HOST:PORT) is of the first node.

    The c10d rendezvous restarts nodes together and gives out ranks itself; the static one does neither, and
    needs ``node_rank``.
    """
    arguments = [f"--nnodes={spec.nodes}", f"--nproc-per-node={spec.processes}"]
    if rendezvous == "c10d":
        arguments += [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}",
            f"--rdzv-id={spec.name}",
            # The second is also for how long a node looks for the first one.
            f"--rdzv-conf=join_timeout={spec.join_timeout},read_timeout={spec.join_timeout}",
            f"--max-restarts={spec.max_restarts}",
        ]
    else:
        host, _, port = endpoint.rpartition(":")
        arguments += [
            f"--node-rank={node_rank}",
            f"--master-addr={host}",
            f"--master-port={port}",
            f"--rdzv-conf=timeout={spec.join_timeout}",
            "--max-restarts=0",  # all starts would share one store, and nodes cannot agree to restart
        ]
    return [*arguments, "-m", MODULE, *spec.arguments()]


class TorchrunBackend:
    """torchrun on this node; the same command on every other one. ``submit`` returns at its end."""

    name: ClassVar[str] = "torchrun"
    UNUSED: ClassVar[frozenset[str]] = RUNS_HERE_UNUSED
    WORKSPACE: ClassVar[str | None] = None
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "rendezvous": "c10d, which restarts all nodes together, or static (c10d)",
        "endpoint": "HOST:PORT of the first node; may be left out for a single node",
        "node-rank": "which node this is, from 0, with rendezvous=static",
        "python": "the Python of the nodes (this one)",
    }

    def render(self, spec: JobSpec) -> Rendered:
        """A command for each node; with c10d all are the same."""
        rendezvous = spec.option("rendezvous", "c10d")
        if rendezvous not in ("c10d", "static"):
            raise ConfigError(f"--option rendezvous={rendezvous} is unknown", fix="use c10d or static")
        alone = f"localhost:{0 if rendezvous == 'c10d' else _PORT}" if spec.nodes == 1 else None
        endpoint = spec.option("endpoint", alone)
        if endpoint is None or not _ENDPOINT.fullmatch(endpoint):
            raise ConfigError(
                f"--option endpoint={endpoint or ''}: {spec.nodes} nodes need the address of the first",
                fix=f"give every node --option endpoint=HOST:{_PORT} with the name of the first node",
            )
        nodes = range(spec.nodes) if rendezvous == "static" else [0]
        files, commands = {}, []
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self._variables(spec).items()]
        for node in nodes:
            arguments = torchrun_arguments(
                spec, endpoint=endpoint, rendezvous=rendezvous, node_rank=str(node)
            )
            python = spec.option("python") or sys.executable
            command = (python, "-m", "torch.distributed.run", *arguments)
            name = f"node-{node}.sh" if rendezvous == "static" else "every-node.sh"
            files[name] = "\n".join([*exports, shlex.join(command), ""])
            commands.append(command)
        return Rendered(files, tuple(commands))

    def validate(self, spec: JobSpec, rendered: Rendered) -> list[str]:
        """By torchrun's own parser."""
        checked = require_recipe(spec)
        for command in rendered.commands:
            check_arguments(list(command[3:]))
        return [*checked, "torchrun's own parser takes the arguments"]

    def submit(self, spec: JobSpec, rendered: Rendered, watch: Watch) -> Submitted:
        """Run this node's share."""
        node = self._node(spec, len(rendered.commands))
        environ = {**os.environ, **self._variables(spec)}
        handle: dict[str, Any] = {"launcher": vars(ProcessIdentity.current()), "node": node}
        with StopRequest() as stop:
            # A session of its own: Ctrl-C in the terminal must not reach processes beside being passed on.
            process = subprocess.Popen(
                rendered.commands[node],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environ,
                start_new_session=True,
                preexec_fn=ask_kernel_to_follow_parent,  # and its processes follow torchrun
            )
            handle["pids"] = [process.pid]
            watch.started(handle)
            log = Path(spec.job_dir) / f"attempt-0/rank-{node}.log"
            tail = _follow(process, log, watch, stop)
        return _ending(spec, handle, process.returncode, tail, stop)

    def status(self, job: Job) -> JobStatus:
        """Of the launcher on this node."""
        return launcher_status(job.handle)

    def logs(self, job: Job) -> Iterator[str]:
        """What torchrun and its processes wrote on the nodes that share this workspace."""
        for path in sorted(job.dir.glob("attempt-0/rank-*.log")):
            yield f"── node {path.stem.removeprefix('rank-')} ──"
            yield from path.read_text(encoding="utf-8", errors="replace").splitlines()

    def cancel(self, job: Job) -> str:
        """SIGTERM to the launcher of this node, and through it to all."""
        return cancel_launcher(job)

    def _node(self, spec: JobSpec, num_commands: int) -> int:
        if num_commands == 1:
            return 0
        given = spec.option("node-rank")
        node = int(given) if given is not None and given.isdecimal() else -1
        if not 0 <= node < num_commands:
            raise ConfigError(
                f"--option node-rank={given or ''}: {num_commands} nodes are 0 to {num_commands - 1}",
                fix="say which node this is with --option node-rank=N",
            )
        return node

    def _variables(self, spec: JobSpec) -> dict[str, str]:
        return {**torchrun_variables(SAVE_SECONDS), **spec.variables()}


def torchrun_variables(save_seconds: int) -> dict[str, str]:
    """What torchrun needs in its environment to give processes time to save, and to start them again."""
    return {SHUTDOWN_VARIABLE: str(save_seconds), OWN_STORE_VARIABLE: "1"}


def check_arguments(arguments: list[str]) -> None:
    """Have torchrun parse its arguments. Raises ConfigError with its words."""
    import contextlib
    import io

    from torch.distributed import run

    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            run.get_args_parser().parse_args(arguments)
    except SystemExit as error:
        said = words.getvalue().strip().splitlines()
        raise ConfigError(f"torchrun does not take its arguments: {said[-1] if said else error}") from error


def _follow(process: subprocess.Popen[str], log: Path, watch: Watch, stop: StopRequest) -> str:
    """Tell and keep the lines of torchrun until it ends; pass on a request to stop, kill at the second."""
    tail: list[str] = []
    assert process.stdout is not None
    log.parent.mkdir(parents=True, exist_ok=True)

    def read(source: IO[str]) -> None:
        with source, log.open("w", encoding="utf-8") as file:
            for line in source:
                file.write(line)
                file.flush()
                watch.log(line.rstrip("\n"))
                tail.append(line)
                del tail[:-_TAIL_LINES]

    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    passed_on = 0
    while process.poll() is None:
        if stop.count > passed_on:
            passed_on = stop.count
            if passed_on == 1:
                watch.note(f"{stop.name}: all processes finish their step and save; once more ends them")
                process.terminate()
            else:
                process.kill()  # its processes go with their parent
        threading.Event().wait(_POLL_SECONDS)
    reader.join(timeout=5.0)
    return "".join(tail)


def _ending(spec: JobSpec, handle: Mapping[str, Any], code: int, tail: str, stop: StopRequest) -> Submitted:
    if code == 0:
        return Submitted(handle, "finished")
    if stop.count:
        return Submitted(handle, "interrupted")
    detail = f"torchrun ended with exit code {code}"
    if spec.nodes > 1 and _NOBODY_CAME.search(tail):
        detail = f"not all of {spec.nodes} nodes came within {spec.join_timeout} s (--join-timeout)"
    return Submitted(handle, "failed", detail, {"tail": last_lines(tail)})
