"""Where a process hangs: Python stacks of all its threads, written when it gets SIGUSR1.

faulthandler writes them from the signal handler itself, in C: also while the main thread waits in a
collective and no Python code runs. A process that is stopped (SIGSTOP) or waits in the kernel cannot answer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

STACKS_VARIABLE = "HEARTH_STACKS_FILE"
_MARK = "Current thread"  # what faulthandler writes for the thread that took the signal


def dump_on_signal(path: Path) -> None:
    """Write the stacks of this process to the end of ``path`` at every SIGUSR1, from now on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # faulthandler keeps the descriptor, not the object: it stays open until the process ends.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)


def collect(processes: Mapping[int, tuple[int, Path]], timeout: float = 5.0) -> dict[int, str]:
    """Ask processes (rank: pid, file) for their stacks; those that do not answer in time are left out.

    Only processes whose file exists are asked: to any other, SIGUSR1 would be the end.
    """
    before = {}
    for rank, (pid, path) in processes.items():
        with contextlib.suppress(OSError):
            before[rank] = path.stat().st_size
            os.kill(pid, signal.SIGUSR1)
    found: dict[int, str] = {}
    last: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(found) < len(before) and time.monotonic() < deadline:
        time.sleep(0.05)
        for rank, start in before.items():
            text = _new_text(processes[rank][1], start)
            if text == last.get(rank) and _is_whole(text):
                found[rank] = text
            last[rank] = text
    return found


def _new_text(path: Path, start: int) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")
    return ""


def _is_whole(text: str) -> bool:
    """Whether the thread that took the signal, which is written last of all, is there with its frames."""
    _, mark, rest = text.rpartition(_MARK)
    return bool(mark) and rest.endswith("\n") and " in " in rest
