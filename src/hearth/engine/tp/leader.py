"""Rank 0's side: starts the other ranks, sends them plans, and ends them all when one of them fails."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from hearth.engine.config import EngineConfig
from hearth.engine.plan import Plan
from hearth.engine.tp import wire
from hearth.engine.tp.collectives import Collectives, open_store
from hearth.errors import ConfigError, EngineDeadError
from hearth.threads import limit_spinning

logger = logging.getLogger(__name__)


class Leader:
    """The processes of ranks 1 to n - 1. Made by `start`, ended by `close`, and by any failure."""

    def __init__(self, path: Path, config: EngineConfig) -> None:
        self.num_ranks = config.tensor_parallel
        self.store = open_store()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[socket.socket] = []
        self.failure: str | None = None
        try:
            for rank in range(1, self.num_ranks):
                self._spawn(rank, path, config)
        except BaseException:
            self.close()
            raise

    def _spawn(self, rank: int, path: Path, config: EngineConfig) -> None:
        ours, theirs = socket.socketpair()
        self.connections.append(ours)
        environment = dict(os.environ)
        limit_spinning(environment)
        settings = json.dumps(asdict(config))
        numbers = [str(theirs.fileno()), str(self.store.port), str(rank)]
        with theirs:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "hearth.engine.tp.worker", *numbers, str(path), settings],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    process_group=0,  # Ctrl-C in the terminal is for the application
                )
            )

    def meet(self, device: torch.device) -> Collectives:
        """Wait until every rank has its weights, and join them. Raises what a rank failed with."""
        self._expect(wire.Loaded)
        self._tell(wire.Loaded())
        with self._guarded("the ranks could not meet"):
            return Collectives(self.store, 0, self.num_ranks, device)

    def begin(self, num_host_blocks: int) -> None:
        """Wait until every rank has its cache; from now on they run the plans of `step`."""
        self._expect(wire.Ready)
        self._tell(wire.Ready(num_host_blocks))

    @contextmanager
    def step(self, plan: Plan) -> Iterator[None]:
        """Let the other ranks compute ``plan`` while this one does.

        If that breaks off anywhere, the ranks are out of step for good: they are ended.
        """
        self.check()
        with self._guarded("a step failed"):
            self._tell(wire.Step.of(plan))
            yield

    def check(self) -> None:
        """Raise `EngineDeadError` if a rank is gone."""
        if self.failure is None:
            for rank, process in enumerate(self.processes, 1):
                if process.poll() is not None:
                    self._fail(f"rank {rank} ended with exit code {process.returncode}")
        if self.failure is not None:
            raise EngineDeadError(f"tensor parallelism: {self.failure}", fix="start a new engine")

    def close(self) -> None:
        """End the other ranks: at once, as they have nothing to save."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            # SIGKILL reaches a stopped process too.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()

    # -- the inside --------------------------------------------------------------------------------------
    def _expect(self, kind: type[wire.Loaded] | type[wire.Ready]) -> None:
        for rank, connection in enumerate(self.connections, 1):
            try:
                message = wire.decode(wire.receive(connection))
            except OSError:
                self._fail(f"rank {rank} ended while it loaded")
                self.check()
            if isinstance(message, wire.Failed):
                self._fail(f"rank {rank} could not load")
                raise message.error.error()
            assert isinstance(message, kind)

    def _tell(self, message: wire.Message | wire.Step) -> None:
        for connection in self.connections:
            wire.send(connection, message)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(EngineDeadError):
                self.check()
            self._fail(f"{what}: {type(error).__name__}: {error}")
            if isinstance(error, OSError | RuntimeError):
                self.check()
            raise

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            logger.error("tensor parallelism: %s", reason)
            self.close()


def device_of(rank: int, device: torch.device) -> torch.device:
    """Where a rank computes: a GPU of its own, or the CPU that all share."""
    return torch.device("cuda", rank) if device.type == "cuda" else device


def check_devices(config: EngineConfig, device: torch.device) -> None:
    """Raise `ConfigError` if there are not GPUs enough for ``config.tensor_parallel``."""
    if device.type == "cuda" and torch.cuda.device_count() < config.tensor_parallel:
        raise ConfigError(
            f"tensor_parallel is {config.tensor_parallel}, and torch sees {torch.cuda.device_count()} GPUs",
            fix="use at most one rank a GPU",
        )
