"""Processes that do not meet, differ, or are lost on the way: an error on every rank, in bounded time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from hearth.errors import ConfigError
from hearth.parallel import meeting
from hearth.workspace import Workspace

PROGRAMS = Path(__file__).parent / "programs"
MODEL = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Processes:
    """Processes that are started one by one, and none of which is left behind."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.started: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(self, command: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        log = self._directory / f"process-{len(self.started)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env={**os.environ, **environ}, stdout=out, stderr=subprocess.STDOUT
            )
        self.started.append((process, log))
        return process

    def group(
        self, command: Sequence[str], size: int, *, ranks: Sequence[int] | None = None, **others: str
    ) -> None:
        """Ranks of a world of ``size``: all, or ``ranks``."""
        port = others.pop("MASTER_PORT", None) or str(free_port())
        for rank in range(size) if ranks is None else ranks:
            self.start(command, place(rank, size, port) | others)

    def texts(self) -> list[str]:
        return [log.read_text(errors="replace") for _, log in self.started]

    def codes(self, seconds: float, *, of: Sequence[int] | None = None) -> list[int]:
        """Exit codes; fails where a process has not ended after so many seconds."""
        deadline = time.monotonic() + seconds
        chosen = [self.started[i][0] for i in (of if of is not None else range(len(self.started)))]
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in chosen]
        except subprocess.TimeoutExpired:
            for process in chosen:
                process.send_signal(signal.SIGUSR1)  # where it stands
            time.sleep(0.5)
            pytest.fail(f"still running after {seconds} s:\n" + "\n".join(t[-2000:] for t in self.texts()))

    def end(self) -> list[int]:
        """Kill what is left; pids of children that outlived their parents."""
        children = []
        for process, _ in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                children += psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
        return [child.pid for child in children if child.is_running()]


def place(rank: int, size: int, port: str) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
    }


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    try:
        yield found
    finally:
        orphans = found.end()
    assert not orphans


def write_recipe(tmp_path: Path, parallel: dict[str, Any], **train: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    recipe = {
        "parallel": {"timeout": 6, **parallel},
        "data": {"sequence_length": 24},
        "model": {"context_length": 64},
        "checkpoint": {"every": 1},
        "train": {"steps": 400, "batch_size": 8, "micro_batch_size": 2, "precision": "fp32", **train},
    }
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp2": (2, {"data": 2}),
    "fsdp2": (2, {"shard": 2}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "hsdp": (4, {"data": 2, "shard": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_process_lost_in_a_step_ends_the_others(
    processes: Processes, tmp_path: Path, workspace_dir: Path, name: str, kind: str
) -> None:
    num, parallel = LAYOUTS[name]
    settings = tmp_path / "settings.json"
    recipe = write_recipe(tmp_path, parallel)
    broken, call = num - 1, 9
    settings.write_text(
        json.dumps({"recipe": str(recipe), "model": MODEL, "rank": broken, "call": call, "signal": kind})
    )
    processes.group([sys.executable, str(PROGRAMS / "lost.py"), str(settings)], num)
    wait_for(processes, broken, "BREAKS", seconds=90)
    others = [rank for rank in range(num) if rank != broken]
    assert processes.codes(30, of=others) == [1] * len(others)
    for rank in others:
        text = processes.texts()[rank]
        assert "Traceback" not in text, text
        assert f"error: rank {rank} of {num} lost a process in step " in text
        assert "hearth train --resume" in text
    with Workspace.open() as workspace:
        (run,) = workspace.runs.list()
        assert run.status == "failed"
        assert "lost a process in step" in str(run.error)


def wait_for(processes: Processes, rank: int, text: str, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while text not in processes.texts()[rank]:
        if time.monotonic() > deadline:
            pytest.fail("\n".join(each[-3000:] for each in processes.texts()))
        time.sleep(0.05)


def meet(*arguments: str) -> list[str]:
    return [sys.executable, str(PROGRAMS / "meet.py"), *arguments]


@pytest.mark.slow
def test_processes_that_cannot_meet_say_so_within_the_timeout(processes: Processes) -> None:
    with socket.socket() as other:  # listens, and speaks no word of what is expected
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        processes.group(meet("6"), 2, MASTER_PORT=taken)
        processes.group(meet("6"), 2, ranks=[0])  # the second never joins
        processes.group(meet("6"), 2, ranks=[1])  # the first one, to be met there, is not there
        assert processes.codes(90) == [1] * 4
    for text in processes.texts():
        assert "Traceback" not in text
        assert "did not meet the others at 127.0.0.1:" in text
        assert "parallel.timeout" in text
        seconds = float(text.split("Error after ")[1].split(" s:")[0])
        assert seconds < 20
    assert f"127.0.0.1:{taken}" in processes.texts()[0]


@pytest.mark.slow
def test_a_second_job_on_the_port_ends_and_the_first_goes_on(processes: Processes, tmp_path: Path) -> None:
    port, done = str(free_port()), tmp_path / "done"
    processes.group(meet("60", str(done)), 2, MASTER_PORT=port)
    for rank in range(2):
        wait_for(processes, rank, "MET 2", seconds=90)
    processes.group(meet("6"), 2, MASTER_PORT=port)
    processes.group(meet("6"), 4, ranks=[3], MASTER_PORT=port)
    assert processes.codes(60, of=[2, 3, 4]) == [1, 1, 1]
    first, second, fourth = processes.texts()[2:]
    assert f"did not meet the others at 127.0.0.1:{port}" in first
    assert f"another process that meets at 127.0.0.1:{port} is rank 1 already" in second
    assert f"another job, of 2 processes, meets at 127.0.0.1:{port}, not 4" in fourth
    assert "Traceback" not in first + second + fourth
    done.touch()
    assert processes.codes(30, of=[0, 1]) == [0, 0]


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_meet_each_other(processes: Processes) -> None:
    """Bare torchrun, as users have it: its store outlives processes, with the addresses of the dead."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    for kind in (["--standalone"], [f"--master-port={free_port()}"]):
        processes.start([*torchrun, *kind, str(PROGRAMS / "again.py")], {"OMP_NUM_THREADS": "1"})
        assert processes.codes(120) == [0] * len(processes.started)
        text = processes.texts()[-1]
        for rank in range(2):
            for turn in ("first", "second"):
                assert text.count(f"start 1: rank {rank} met 2, {turn} time") == 1


@pytest.mark.slow
def test_processes_that_are_done_end_well_however_soon(processes: Processes) -> None:
    """Without the wait in `leave`, a third of such starts, or more, end by abort."""
    for _ in range(8):
        processes.group([sys.executable, str(PROGRAMS / "leave.py")], 2, OMP_NUM_THREADS="1")
        assert processes.codes(60) == [0] * len(processes.started), "\n".join(processes.texts())


def test_restarts_by_torchrun_that_would_be_in_vain_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = place(1, 4, "29500") | {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert meeting.place() == (1, 4)  # every start has a store of its own
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConfigError, match="restart processes on 2 nodes with one store") as caught:
        meeting.place()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(caught.value.fix)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert meeting.place() == (1, 4)


@pytest.mark.slow
def test_processes_that_were_started_with_different_things_say_which(processes: Processes) -> None:
    processes.group([sys.executable, str(PROGRAMS / "differ.py")], 2)
    assert processes.codes(120) == [0, 0]
    expected = {
        "recipe": "the processes differ in the recipe: rank 0 has ",
        "resume": "the processes differ in --resume: rank 0 has b, rank 1 has a",
        "__version__": "the version of Hearth: rank 0 has 1.0.0, rank 1 has 9.9.9",
        "torch.__version__": "the version of torch: rank 0 has 1.0.0, rank 1 has 9.9.9",
        "transformers.__version__": "the version of transformers: rank 0 has 1.0.0, rank 1 has 9.9.9",
        "data": "the processes differ in the data: rank 0 has ",
        "number": "the processes differ in the ",
    }
    for text in processes.texts():
        (line,) = (line for line in text.splitlines() if line.startswith("RESULT "))
        found = json.loads(line.removeprefix("RESULT "))
        assert found.keys() == expected.keys()
        for name, message in expected.items():
            assert message in found[name]
            assert "fix: " in found[name]


@pytest.mark.slow
def test_a_finished_run_is_resumed_as_one_process_does(
    launch: Any, tmp_path: Path, workspace_dir: Path
) -> None:
    recipe = json.loads(write_recipe(tmp_path, {"data": 2, "timeout": 60}, steps=2).read_text())
    settings = tmp_path / "settings.json"
    runs = []
    for num in (2, 2, 1):  # the last one alone, which is how it must be
        recipe["parallel"] = {"data": num}
        settings.write_text(
            json.dumps({"recipe": recipe, "model": MODEL, "resume": runs[0]["run"] if runs else None})
        )
        (line,) = (
            line for line in launch("fit", num, [str(settings)])[0].splitlines() if line.startswith("RESULT ")
        )
        runs.append(json.loads(line.removeprefix("RESULT ")))
    assert runs == [{"run": runs[0]["run"], "status": "finished"}] * 3
    with Workspace.open() as workspace:
        directory = workspace.runs.get(runs[0]["run"]).dir
        assert (directory / "model" / "model.safetensors").is_file()
        assert not [path.name for path in directory.iterdir() if "new" in path.name or "old" in path.name]
