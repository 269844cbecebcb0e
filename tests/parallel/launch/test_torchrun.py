"""Command lines for torchrun, and torchrun itself with test processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hearth.errors import ConfigError
from hearth.parallel.launch.backend import Submitted
from hearth.parallel.launch.jobs import JobStore
from hearth.parallel.launch.spec import JobSpec, Rendered
from hearth.parallel.launch.torchrun import MODULE, TorchrunBackend, check_arguments

PROCESS = str(Path(__file__).with_name("job_process.py"))


def test_one_node_needs_no_address(bare_spec: Callable[..., JobSpec]) -> None:
    rendered = TorchrunBackend().render(bare_spec("train.steps=5"))
    (command,) = rendered.commands
    assert command == (
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "--rdzv-id=job-1",
        "--rdzv-conf=join_timeout=600,read_timeout=600", "--max-restarts=3",
        "-m", MODULE, "recipe.yaml", "train.steps=5",
    )  # fmt: skip
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300" in rendered.files["every-node.sh"]


def test_the_static_rendezvous_has_a_command_for_each_node(bare_spec: Callable[..., JobSpec]) -> None:
    options = {"rendezvous": "static", "endpoint": "node-a:29500", "node-rank": "1"}
    spec = bare_spec(nodes=2, options=options)
    rendered = TorchrunBackend().render(spec)
    assert list(rendered.files) == ["node-0.sh", "node-1.sh"]
    assert "--node-rank=1 --master-addr=node-a --master-port=29500" in rendered.files["node-1.sh"]
    assert "--max-restarts=0" in rendered.files["node-1.sh"]  # its nodes cannot agree to restart
    assert TorchrunBackend()._node(spec, 2) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "2 nodes need the address of the first"),
        ({"endpoint": "node-a"}, "need the address of the first"),
        ({"endpoint": "a:1", "rendezvous": "etcd"}, "rendezvous=etcd is unknown"),
    ],
)
def test_what_cannot_be_rendered(
    bare_spec: Callable[..., JobSpec], options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchrunBackend().render(bare_spec(nodes=2, options=options))


@pytest.mark.parametrize("rank", [None, "2", "-1", "first"])
def test_a_static_node_must_say_which_it_is(bare_spec: Callable[..., JobSpec], rank: str | None) -> None:
    given = {} if rank is None else {"node-rank": rank}
    spec = bare_spec(nodes=2, options={"rendezvous": "static", "endpoint": "a:1", **given})
    with pytest.raises(ConfigError, match="2 nodes are 0 to 1"):
        TorchrunBackend()._node(spec, 2)


def test_torchruns_own_parser_takes_both_kinds_and_refuses_others(bare_spec: Callable[..., JobSpec]) -> None:
    for options in ({"endpoint": "a:1"}, {"endpoint": "a:1", "rendezvous": "static"}):
        for command in TorchrunBackend().render(bare_spec(nodes=2, options=options)).commands:
            check_arguments(list(command[3:]))
    with pytest.raises(ConfigError, match=r"torchrun does not take its arguments: .*--nnodez"):
        check_arguments(["--nnodez=2", "-m", MODULE])


def run(spec: JobSpec, told: Any, process: str = PROCESS) -> Submitted:
    """Submit, with test processes in the place of training."""
    backend = TorchrunBackend()
    rendered = backend.render(spec)
    commands = []
    for command in rendered.commands:
        where = command.index(MODULE)
        commands.append((*command[: where - 1], process, *command[where + 1 :]))
    JobStore(Path(spec.workspace)).create("torchrun", spec, rendered)
    return backend.submit(spec, Rendered(rendered.files, tuple(commands)), told.watch)


LAUNCHER = """
import sys
from hearth.parallel.launch.backend import Watch
from hearth.parallel.launch.spec import JobSpec, Rendered
from hearth.parallel.launch.torchrun import TorchrunBackend
spec = JobSpec("job-1", "recipe.yaml", sys.argv[1])
command = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")
watch = Watch(print, print, lambda handle: print(handle["pids"][0], flush=True))
TorchrunBackend().submit(spec, Rendered({}, (command,)), watch)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_launcher_that_is_killed_takes_torchrun_along(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert psutil.pid_exists(pid)
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    deadline = time.monotonic() + 10.0
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(bare_spec: Callable[..., JobSpec], told: Any) -> None:
    done = run(bare_spec("raise:1:12"), told)
    assert done.state == "finished"
    assert [line for line in told.lines if "rank 0 of 2 begins" in line] == [
        "rank 0 of 2 begins at step 0",
        "rank 0 of 2 begins at step 10",
    ]


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_find_each_other(
    bare_spec: Callable[..., JobSpec], told: Any
) -> None:
    done = run(bare_spec(max_restarts=1), told, str(Path(PROCESS).with_name("gloo_process.py")))
    assert done.state == "finished", told.lines[-20:]
    assert sorted(line for line in told.lines if "counts" in line) == ["rank 0 counts 4", "rank 1 counts 4"]


@pytest.mark.slow
def test_a_signal_lets_processes_under_torchrun_save(bare_spec: Callable[..., JobSpec], told: Any) -> None:
    def interrupt() -> None:
        while sum("begins" in line for line in told.lines) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    done = run(bare_spec("endless:0:0"), told)
    assert done.state == "interrupted"
    assert sum("saved at step" in line for line in told.lines) == 2


@pytest.mark.slow
def test_a_node_that_never_joins_is_told_with_the_time(bare_spec: Callable[..., JobSpec], told: Any) -> None:
    options = {"endpoint": "localhost:29477"}
    done = run(bare_spec(nodes=2, join_timeout=5, options=options), told)
    assert done.state == "failed"
    assert done.detail == "not all of 2 nodes came within 5 s (--join-timeout)"
