"""Stacks of processes that do not move."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hearth.parallel.health.stacks import collect

CHILD = """
import sys, threading, time
from pathlib import Path
from hearth.parallel.health.stacks import dump_on_signal
dump_on_signal(Path(sys.argv[1]))
def stuck_here():
    lock = threading.Lock(); lock.acquire()
    print("ready", flush=True)
    lock.acquire()  # waits in C, for ever
stuck_here()
"""
Start = Callable[[str], tuple[subprocess.Popen[str], Path]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3] / "src"))
    children = []

    def begin(name: str) -> tuple[subprocess.Popen[str], Path]:
        path = tmp_path / f"{name}.stacks"
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), name], stdout=subprocess.PIPE, text=True
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child, path

    yield begin
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


def test_processes_that_wait_answer_each_time_and_a_stopped_one_does_not(start: Start) -> None:
    (waiting, path), (stopped, other) = start("a"), start("b")
    stopped.send_signal(signal.SIGSTOP)
    asked = {0: (waiting.pid, path), 4: (stopped.pid, other)}
    for _ in range(2):
        found = collect(asked, timeout=1.5)
        assert list(found) == [0]
        assert found[0].count("in stuck_here") == 1
    assert waiting.poll() is None


def test_a_process_that_is_not_ready_is_not_asked(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        time.sleep(0.2)
        assert collect({0: (child.pid, tmp_path / "none")}, timeout=0.3) == {}
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
    assert collect({0: (os.getpid(), tmp_path / "none")}, timeout=0.1) == {}
