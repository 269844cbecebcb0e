"""Who runs a job, and whether that process still lives."""

from __future__ import annotations

import functools
import os
import socket
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

# A process that we cannot look at (another machine or container) counts as gone after this silence.
SILENCE = timedelta(minutes=5)


@dataclass(frozen=True)
class ProcessIdentity:
    """One process: its machine, the boot and process namespace that its pid belongs to, and its start."""

    host: str
    system_id: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> ProcessIdentity:
        """The identity of this process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _system_id(), pid, _start_time(pid) or 0.0)

    def is_alive(self, heartbeat: datetime, now: datetime) -> bool:
        """Whether the process still runs: by its pid where we can see it, else by its last heartbeat.

        A pid alone is not enough, as numbers are given again; the start time tells the two apart.
        """
        if self.system_id == _system_id():
            started = _start_time(self.pid)
            return started is not None and abs(started - self.started) < 2.0
        return now - heartbeat < SILENCE


@functools.cache
def _system_id() -> str:
    """The boot of this machine and the namespace of process numbers (containers have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - a magic link, not a path
    except OSError:
        import psutil

        return f"{socket.gethostname()}/{int(psutil.boot_time())}"


def _start_time(pid: int) -> float | None:
    """When the process started, in seconds since the epoch; None when it is gone or a zombie."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time())
    except psutil.Error:
        return None
