"""The processes of one start of a job on this machine: started, watched, told to stop, killed whole."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from hearth.errors import ConfigError, TrainingError
from hearth.parallel.health import stacks
from hearth.parallel.health.cause import Death, last_lines
from hearth.parallel.launch.start import LIFELINE_VARIABLE
from hearth.workspace.lifeline import kill_group

_TAIL_BYTES = 16_384
_KILL_SECONDS = 10.0


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    log: Path
    stacks: Path
    waiter: threading.Thread | None = None
    exit_code: int | None = None
    ended_at: float | None = None
    shown: int = 0  # bytes of the log that were given out


class LocalGroup:
    """Processes, ``places`` with torchrun's variables of each; a context manager that leaves none behind."""

    def __init__(
        self,
        command: Sequence[str],
        places: Mapping[int, Mapping[str, str]],
        *,
        directory: Path,
        environ: Mapping[str, str],
    ) -> None:
        self._children: dict[int, _Child] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for rank, place in places.items():
                self._children[rank] = _start(command, rank, {**environ, **place}, directory)
        except OSError as error:
            self.kill()
            raise TrainingError(
                f"process {len(self._children)} of {len(places)} could not be started: {error}",
                fix="start fewer processes, or raise the limits of this machine (ulimit -u, -n)",
            ) from error

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: child.process.pid for rank, child in self._children.items()}

    def exit_codes(self) -> dict[int, int]:
        """Of the ranks that have ended; minus the signal's number for one that was killed."""
        return {
            rank: child.exit_code
            for rank, child in self._children.items()
            if child.exit_code is not None and child.ended_at is not None
        }

    def deaths(self) -> list[Death]:
        """The ranks that ended with anything but 0, with their last lines."""
        return [
            Death(rank, self._children[rank].ended_at or 0.0, code, self.tail(rank))
            for rank, code in self.exit_codes().items()
            if code != 0
        ]

    def stopped(self) -> list[int]:
        """Ranks that somebody stopped (SIGSTOP), which no signal but SIGCONT or SIGKILL reaches."""
        found = []
        for rank, child in self._children.items():
            with contextlib.suppress(psutil.Error):
                if psutil.Process(child.process.pid).status() == psutil.STATUS_STOPPED:
                    found.append(rank)
        return found

    def stacks(self) -> dict[int, str]:
        """Python stacks of the ranks that run and answer."""
        running = {
            rank: (child.process.pid, child.stacks)
            for rank, child in self._children.items()
            if child.exit_code is None
        }
        return stacks.collect(running)

    def tail(self, rank: int) -> str:
        """The last lines that a rank wrote."""
        with contextlib.suppress(OSError), self._children[rank].log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return last_lines(file.read().decode(errors="replace"))
        return ""

    def new_lines(self, *, last: bool = False) -> list[tuple[int, str]]:
        """Whole lines that ranks have written since the last call; with ``last`` an unfinished one, too."""
        found = []
        for rank, child in self._children.items():
            with contextlib.suppress(OSError), child.log.open("rb") as file:
                file.seek(child.shown)
                text = file.read()
                whole = len(text) if last else text.rfind(b"\n") + 1
                child.shown += whole
                found += [(rank, line) for line in text[:whole].decode(errors="replace").splitlines()]
        return found

    def signal(self, number: int) -> None:
        """Send a signal to each rank, not to what it started."""
        for child in self._children.values():
            if child.exit_code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.process.pid, number)

    def kill(self) -> None:
        """End all ranks and whatever they started; nothing of them runs when this returns."""
        for child in self._children.values():
            # Also the group of a rank that has ended: workers of its own may be left in it. Nobody has been
            # given its number since, as it has not been reaped.
            if child.process.returncode is None:
                kill_group(child.process.pid)
        for child in self._children.values():
            if child.waiter is not None:
                child.waiter.join(
                    _KILL_SECONDS
                )  # it wants to know the exit code before the process is reaped
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(_KILL_SECONDS)
            if child.process.stdin is not None:
                with contextlib.suppress(OSError):
                    child.process.stdin.close()

    def __enter__(self) -> LocalGroup:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.kill()


def _start(command: Sequence[str], rank: int, environ: Mapping[str, str], directory: Path) -> _Child:
    log, stacks_file = directory / f"rank-{rank}.log", directory / f"rank-{rank}.stacks"
    own = {
        LIFELINE_VARIABLE: "stdin",
        stacks.STACKS_VARIABLE: str(stacks_file),
        "PYTHONUNBUFFERED": "1",  # the last line before a death is the one that counts
    }
    file: IO[bytes]
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**environ, **own},
            start_new_session=True,
        )
    child = _Child(process, log, stacks_file)

    def wait() -> None:
        code = _wait(process)
        child.ended_at = time.monotonic()  # of several deaths within one poll, the order tells the first
        child.exit_code = code

    child.waiter = threading.Thread(target=wait, name=f"rank-{rank}", daemon=True)
    child.waiter.start()
    return child


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end, and leave the process to be reaped: until then its number is not given again."""
    if not hasattr(os, "waitid"):
        return process.wait()
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if ended is None:
        return process.wait()
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def place_of(rank: int, *, nodes: int, processes: int, address: str, port: int) -> dict[str, str]:
    """Torchrun's variables of one process; ``address`` and ``port`` are where rank 0 listens."""
    node, local_rank = divmod(rank, processes)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(nodes * processes),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def require_free(port: int) -> int:
    """``port``, which the user chose. Raises ConfigError when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"port {port} cannot be used: {getattr(error, 'strerror', None) or error}",
                fix="leave out the option port, and a free one is found",
            ) from error
    return port
