"""Jobs on this machine whose processes die, hang, stop, straggle, or are told to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hearth.errors import ConfigError
from hearth.parallel.health.heartbeat import read_run
from hearth.parallel.launch.group import free_port, require_free
from hearth.parallel.launch.local import LocalBackend, patience_of
from hearth.parallel.launch.spec import JobSpec

Begin = Callable[..., tuple[subprocess.Popen[str], list[int]]]
Launch = Callable[..., tuple[Any, Any]]
LAUNCHER = """
import sys
from pathlib import Path
from hearth.parallel.launch.backend import Watch
from hearth.parallel.launch.local import LocalBackend
from hearth.parallel.launch.spec import JobSpec
spec = JobSpec("job-1", "recipe.yaml", sys.argv[1], overrides=tuple(sys.argv[3:]), processes=2,
               options=(("hang-seconds", "60"),))
Path(spec.job_dir).mkdir(parents=True)
say = lambda *words: print(*words, flush=True)
watch = Watch(say, say, lambda handle: say("PIDS", *handle["pids"]))
done = LocalBackend((sys.executable, sys.argv[2])).submit(spec, None, watch)
say("STATE", done.state)
"""


def first_steps(told: Any) -> list[int]:
    """The step that rank 0 began at, start by start."""
    found = [re.search(r"rank 0 of 2 begins at step (\d+)", line) for line in told.lines]
    return [int(each.group(1)) for each in found if each is not None]


def test_all_processes_run_and_their_lines_are_told(launch_local: Launch, told: Any) -> None:
    done, job = launch_local()
    assert (done.state, done.facts["restarts"], told.notes) == ("finished", 0, [])
    assert sorted(line for line in told.lines if "done" in line) == [
        "[rank 0] rank 0 is done",
        "[rank 1] rank 1 is done",
    ]
    assert (job.dir / "attempt-0" / "rank-1.log").read_text().splitlines()[-1] == "rank 1 is done"
    assert read_run(job.dir).id == "r1"


@pytest.mark.parametrize(
    ("what", "why"), [("raise", "exit code 1"), ("kill", "killed by SIGKILL, out of memory perhaps")]
)
def test_a_dead_process_is_named_and_all_go_on_from_the_last_checkpoint(
    launch_local: Launch, told: Any, what: str, why: str
) -> None:
    done, _job = launch_local(f"{what}:1:12")
    assert (done.state, done.facts["restarts"]) == ("finished", 1)
    (failure,) = done.facts["failures"]
    assert (failure["rank"], failure["why"], failure["attempt"]) == (1, why, 0)
    assert ("has had enough" in failure["tail"]) == (what == "raise")
    assert first_steps(told) == [0, 10]  # of an interval of 5 steps, less than one is lost
    assert told.notes[0].startswith("rank 1 failed at step 12: " + why)
    assert told.notes[1] == "restart 1 of 3 in 0.1 s, from the last checkpoint of run r1"


def test_a_hang_is_told_with_the_stacks_of_all_ranks(launch_local: Launch, told: Any) -> None:
    done, _job = launch_local("hang:1:12", options={"hang-seconds": "2"})
    assert (done.state, first_steps(told)) == ("finished", [0, 10])
    (failure,) = done.facts["failures"]
    assert failure["step"] == 12
    assert re.search(r"silent for \d+ s \(training, step 12\)", failure["why"])
    told_stacks = told.notes[0].split("stacks of rank ")
    assert len(told_stacks) == 3
    assert "in together" in told_stacks[1]  # rank 0 waits for rank 1, which is where it was told to hang
    assert "in misbehave" in told_stacks[2]


@pytest.mark.slow
def test_a_stopped_process_is_the_culprit_among_the_silent(launch_local: Launch, told: Any) -> None:
    done, _job = launch_local("stop:0:12", options={"hang-seconds": "2"})
    assert (done.state, first_steps(told)) == ("finished", [0, 10])
    (failure,) = done.facts["failures"]
    assert failure["rank"] == 0
    assert "stopped (SIGSTOP)" in failure["why"]
    assert "no answer from rank 0" in told.notes[0]
    assert "stacks of rank 1" in told.notes[0]


def test_who_is_waited_for_in_vain_is_named_and_not_who_gave_up_first(
    launch_local: Launch, told: Any
) -> None:
    """The patience of a collective may be shorter than that of the launcher."""
    done, _job = launch_local("stop:1:12", "impatient:0:0")
    assert (done.state, first_steps(told)) == ("finished", [0, 10])
    (failure,) = done.facts["failures"]
    assert (failure["rank"], failure["step"]) == (1, 12)
    assert failure["why"] == "rank 0 waited for it in vain, the process is stopped (SIGSTOP)"


@pytest.mark.slow
def test_one_that_hangs_while_the_others_give_up_is_named_by_its_stacks(
    launch_local: Launch, told: Any
) -> None:
    done, _job = launch_local("hang:1:12", "impatient:0:0")
    assert (done.state, first_steps(told)) == ("finished", [0, 10])
    (failure,) = done.facts["failures"]
    assert failure["rank"] == 1
    assert "in misbehave" in told.notes[0]


@pytest.mark.slow
def test_a_slow_process_is_named_and_kept(launch_local: Launch, told: Any) -> None:
    done, _job = launch_local("slow:1:0")
    assert (done.state, done.facts["restarts"]) == ("finished", 0)
    assert told.notes == ["rank 1 is slow: 0.12 s a step, the others 0.03 s"]


@pytest.mark.slow
def test_restarts_are_limited_and_the_last_failure_is_the_result(launch_local: Launch, told: Any) -> None:
    done, _job = launch_local("always-raise:0:12", max_restarts=2)
    assert (done.state, done.facts["restarts"], done.detail) == ("failed", 2, "rank 0: exit code 1")
    assert first_steps(told) == [0, 10, 10]
    assert [note for note in told.notes if note.startswith("restart")] == [
        "restart 1 of 2 in 0.1 s, from the last checkpoint of run r1",
        "restart 2 of 2 in 0.2 s, from the last checkpoint of run r1",
    ]


def test_without_a_checkpoint_the_job_starts_over(launch_local: Launch, told: Any) -> None:
    done, _job = launch_local("raise:0:2")
    assert (done.state, first_steps(told)) == ("finished", [0, 0])
    assert told.notes[1].endswith("from the start")


def test_input_that_is_wrong_is_not_tried_again(launch_local: Launch, told: Any) -> None:
    done, _job = launch_local("refuse:1:0")
    assert (done.state, done.facts["restarts"], done.detail) == ("failed", 0, "rank 1: exit code 2")
    assert first_steps(told) == [0]


@pytest.mark.slow
def test_a_port_that_somebody_took_meanwhile_is_no_failure(launch_local: Launch, told: Any) -> None:
    done, job = launch_local("port:0:start", max_restarts=0)
    assert (done.state, done.facts["restarts"]) == ("finished", 0)
    assert (job.dir / "attempt-1").is_dir()


@pytest.mark.slow
def test_a_process_that_never_begins_is_a_hang(launch_local: Launch, told: Any) -> None:
    done, _job = launch_local("hang:1:start", max_restarts=0, options={"quiet-seconds": "15"})
    assert (done.state, done.facts["failures"][0]["rank"]) == ("failed", 1)
    assert "s since its start" in done.facts["failures"][0]["why"]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Start a launcher in a process of its own; gives it with the ids of its processes, all at work."""
    launchers = []

    def start(*orders: str) -> tuple[subprocess.Popen[str], list[int]]:
        process = Path(__file__).with_name("job_process.py")
        command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "ws"), str(process), *orders]
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        launchers.append(launcher)
        assert launcher.stdout is not None
        pids: list[int] = []
        begun = 0
        while begun < 2:
            line = launcher.stdout.readline()
            assert line, "the launcher ended early"
            if line.startswith("PIDS"):
                pids = [int(pid) for pid in line.split()[1:]]
            begun += "begins at step" in line
        return launcher, pids

    yield start
    for launcher in launchers:
        launcher.kill()
        launcher.wait()
        assert launcher.stdout is not None
        launcher.stdout.close()


def wait_gone(pids: list[int], seconds: float = 10.0) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(psutil.pid_exists, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_lets_all_save(begin: Begin, number: int) -> None:
    launcher, pids = begin()
    launcher.send_signal(number)
    rest = launcher.communicate(timeout=30)[0]
    assert "STATE interrupted" in rest
    assert rest.count("saved at step") == 2
    assert "failed" not in rest
    assert wait_gone(pids) == []


@pytest.mark.slow
def test_a_second_signal_ends_even_a_job_that_hangs(begin: Begin) -> None:
    launcher, pids = begin("hang:0:1")
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert "STATE interrupted" in launcher.communicate(timeout=30)[0]
    assert wait_gone(pids) == []


@pytest.mark.parametrize("orders", [(), ("stop:1:1",)], ids=["running", "stopped"])
def test_a_launcher_that_is_killed_leaves_no_process(begin: Begin, orders: tuple[str, ...]) -> None:
    launcher, pids = begin(*orders)
    if orders:
        time.sleep(0.5)
    launcher.kill()
    launcher.wait()
    assert wait_gone(pids) == []


def test_more_than_one_node_and_bad_options_are_refused(make_spec: Callable[..., JobSpec]) -> None:
    with pytest.raises(ConfigError, match="--nodes 2: --on local is this machine alone"):
        LocalBackend().render(make_spec(nodes=2))
    with pytest.raises(ConfigError, match="hang-seconds=soon: no positive number"):
        patience_of(make_spec(options={"hang-seconds": "soon"}))


def test_a_chosen_port_that_is_in_use_is_refused() -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be used: Address already in use"):
            require_free(port)
    assert require_free(free_port()) > 0
    with pytest.raises(ConfigError, match="port 70000 cannot be used"):
        require_free(70000)


def test_status_and_cancel_know_the_launcher(
    launch_local: Launch, told: Any, make_spec: Callable[..., JobSpec]
) -> None:
    from hearth.parallel.launch.jobs import JobStore

    store, seen = JobStore(Path(make_spec().workspace)), {}

    def look() -> None:
        while not told.handles:
            time.sleep(0.02)
        job = store.update(store.get("job-1"), handle=told.handles[0])
        seen["status"] = LocalBackend().status(job).state
        while sum("begins" in line for line in told.lines) < 2:
            time.sleep(0.02)
        seen["cancel"] = LocalBackend().cancel(job)

    thread = threading.Thread(target=look)
    thread.start()
    done, job = launch_local(options={"hang-seconds": "60"})
    thread.join()
    assert seen["status"] == "running"
    assert f"asked process {os.getpid()} to stop" in seen["cancel"]
    assert done.state == "interrupted"
    log = list(LocalBackend().logs(job))
    assert "── attempt-0, rank-1 ──" in log
    assert any("saved at step" in line for line in log)
    assert json.loads((job.dir / "job.json").read_text())["backend"] == "local"
