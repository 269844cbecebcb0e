"""Children never outlive their parent, whatever kills it.

A supervised process leads a process group of its own, so that Ctrl-C in a terminal reaches the parent only,
which then drains. Its standard input is a pipe that the parent holds open and never writes to: end of file
means that the parent is gone, even by SIGKILL, and the whole group is killed, engine processes included.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(before: Callable[[], None] | None = None) -> None:
    """Watch standard input from a thread; at its end call ``before`` and kill this process group.

    On Linux the kernel is asked for a SIGKILL as well, which also reaches a process that is stopped.
    """
    ask_kernel_to_follow_parent()

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        if before is not None:
            before()
        kill_group(os.getpgrp() if os.getpgrp() == os.getpid() else None)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def ask_kernel_to_follow_parent() -> None:
    """On Linux, a SIGKILL when the thread that started this process ends; elsewhere nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_group(group: int | None) -> None:
    """SIGKILL to every process of ``group``; ``None`` ends only this process."""
    if group is None:
        os._exit(1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def event_channel() -> int:
    """Keep standard output for events to the parent, and send whatever else is printed to standard error.

    Returns a descriptor that children do not inherit, so a stray print of a library, or an engine process
    that outlives us for a moment, cannot write into the channel or hold it open.
    """
    sys.stdout.flush()
    channel = os.dup(1)
    os.dup2(2, 1)
    return channel
