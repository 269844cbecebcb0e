"""Starts the processes of a measurement as torchrun would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")


class WorkersFailed(Exception):
    """A process died, or they took too long."""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_together(
    command: Sequence[str], num: int, folder: Path, *, variables: Mapping[str, str], seconds: float
) -> list[str]:
    """What ``num`` processes of a command print, by rank. Raises WorkersFailed with their last words."""
    base = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    base |= {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [folder / f"{rank}.log" for rank in range(num)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            environment = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("wb") as out:
                processes.append(
                    subprocess.Popen(list(command), env=environment, stdout=out, stderr=subprocess.STDOUT)
                )
        codes = _wait(processes, time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    printed = [log.read_text(errors="replace") for log in logs]
    if any(codes):
        words = "\n".join(text[-3000:] for text in printed)
        raise WorkersFailed(f"{' '.join(command[-2:])} failed with {codes}:\n{words}")
    return printed


def measure(part: str, num: int, settings: dict[str, Any], *, seconds: float = 600) -> list[dict[str, Any]]:
    """What ``num`` processes, one thread each, found of a part, by rank. Raises WorkersFailed."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / f"{part}.json"
        job.write_text(json.dumps({**settings, "part": part}))
        command = [sys.executable, str(WORKER), str(job)]
        run_together(command, num, Path(folder), variables={"OMP_NUM_THREADS": "1"}, seconds=seconds)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num)]


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> list[int]:
    """Exit codes; -1 for those that are still there at the deadline, or a little after another has failed."""
    failed = False
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes):
            break
        if any(codes) and not failed:
            failed, deadline = True, min(deadline, time.monotonic() + 5.0)
        time.sleep(0.1)
    return [-1 if (code := process.poll()) is None else code for process in processes]
