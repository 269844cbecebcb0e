"""Programs of several processes, started as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
Launch = Callable[..., list[str]]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run a program of ``programs/`` in ``num`` processes; their output by rank. Fails where one fails."""

    def run(
        name: str, num: int, arguments: Sequence[str], *, seconds: float = 240, code: int = 0
    ) -> list[str]:
        base = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        logs = [tmp_path / f"{name}-{num}-{rank}.log" for rank in range(num)]
        processes = []
        for rank, log in enumerate(logs):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num)}
            with log.open("wb") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(PROGRAMS / f"{name}.py"), *arguments],
                        env=base | variables,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = time.monotonic() + seconds
        try:
            codes = [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                process.kill()
        texts = [log.read_text(errors="replace") for log in logs]
        assert codes == [code] * num, "\n".join(text[-3000:] for text in texts)
        return texts

    return run
