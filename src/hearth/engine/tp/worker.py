"""The process of a rank other than 0: loads its part, then computes every plan that rank 0 sends.

It ends when rank 0 closes the socket, whatever it is doing, and when anything fails: rank 0 notices either.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path

import torch

from hearth.engine.assembly import assemble
from hearth.engine.config import EngineConfig
from hearth.engine.hostcopy import HostBlocks
from hearth.engine.loading import choose_device
from hearth.engine.runner import Runner
from hearth.engine.tp import wire
from hearth.engine.tp.collectives import Collectives, open_store
from hearth.engine.tp.leader import device_of
from hearth.engine.tp.loading import load_part
from hearth.engine.wire import WireError

logger = logging.getLogger("hearth.engine.tp.worker")


class Inbox(threading.Thread):
    """Frames from rank 0 in a queue; ends the process when rank 0 is gone."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(name="hearth-rank-inbox", daemon=True)
        self.connection = connection
        self.frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            try:
                self.frames.put(wire.receive(self.connection))
            except OSError:
                # The main thread may be waiting in a layer for ranks that will never come.
                os._exit(0)


def _prepare(
    connection: socket.socket, inbox: Inbox, port: int, rank: int, path: Path, config: EngineConfig
) -> Runner:
    torch.set_num_threads(config.num_threads or 1)
    device = device_of(rank, choose_device(config.device))
    model, connect = load_part(path, config, rank, device)
    wire.send(connection, wire.Loaded())
    inbox.frames.get()
    group = Collectives(open_store(port), rank, config.tensor_parallel, device)
    connect(group)
    runner, _, _ = assemble(model, config, group=group)
    wire.send(connection, wire.Ready())
    ready = wire.decode(inbox.frames.get())
    assert isinstance(ready, wire.Ready)
    if ready.num_host_blocks:
        runner.host = HostBlocks(runner.layers, ready.num_host_blocks)
    return runner


def main(arguments: list[str]) -> int:
    """``python -m hearth.engine.tp.worker FD PORT RANK DIRECTORY CONFIG``"""
    descriptor, port, rank, path, settings = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(descriptor))
    connection.set_inheritable(False)
    sys.stdout = sys.stderr  # standard output belongs to the application
    inbox = Inbox(connection)
    inbox.start()
    config = EngineConfig.of(**json.loads(settings))
    try:
        runner = _prepare(connection, inbox, int(port), int(rank), Path(path), config)
    except Exception as error:
        logger.debug("rank %s could not load", rank, exc_info=True)
        wire.send(connection, wire.Failed(WireError.of(error)))
        return 1
    while True:
        runner.execute(wire.decode_step(inbox.frames.get()).plan())


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:])
    except Exception:
        logger.exception("a rank failed")
        exit_code = 1
    sys.stderr.flush()
    # Skipping interpreter shutdown: threads of torch are still parked, and there is nothing to save.
    os._exit(exit_code)
