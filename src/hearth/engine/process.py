"""The engine's own process: reads commands, steps, sends what was gained. Started by `AsyncEngine` only.

Two threads: one reads the socket and fills a queue, the main one runs the loop. When the socket closes, the
application is gone and the process ends at once, whatever it is doing. Nothing goes to standard output.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from hearth.engine import wire
from hearth.engine.config import EngineConfig
from hearth.engine.outputs import RequestOutput

logger = logging.getLogger("hearth.engine.process")

HEARTBEAT_SECONDS = 0.5


class CommandReader(threading.Thread):
    """Puts commands into a queue; ends the process when the application closes the socket."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(name="hearth-engine-commands", daemon=True)
        self.connection = connection
        self.commands: queue.SimpleQueue[wire.Command | Prepared] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            try:
                header = self._read(wire.HEADER_SIZE)
                body = self._read(wire.frame_length(header))
            except OSError:
                # No clean-up: there is nobody to tell, and the main thread may be deep in a kernel.
                os._exit(0)
            try:
                self.commands.put(wire.decode_command(body))
            except ValueError:
                # A deaf engine would look alive: better that everyone who waits is told that it is gone.
                logger.critical("a command that cannot be read", exc_info=True)
                os._exit(1)

    def _read(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = self.connection.recv(length - len(parts))
            if not part:
                raise ConnectionResetError
            parts += part
        return bytes(parts)


@dataclass(frozen=True)
class Prepared:
    """A request whose grammar was compiled beside the loop, or could not be."""

    command: wire.AddRequest
    outcome: Future[None]


class EngineLoop:
    """Feeds an engine with commands and its outputs back; `run` returns after a shutdown."""

    def __init__(
        self,
        connection: socket.socket,
        commands: queue.SimpleQueue[wire.Command | Prepared],
        reference: str,
        config: EngineConfig,
    ) -> None:
        from hearth.engine.llm import Engine

        self.connection = connection
        self.commands = commands
        self.engine = Engine.load(reference, config)
        self.stopping = False
        self.preparing: dict[str, wire.AddRequest] = {}
        self.compiling = ThreadPoolExecutor(1, "hearth-engine-grammars")
        self.compiling.submit(self.engine.grammars.warm_up)
        # What a model leaves in memory stays: the collector need not look at it again, while requests wait.
        gc.collect()
        gc.freeze()
        self.last_beat = 0.0

    def send(self, message: wire.Event) -> None:
        self.connection.sendall(wire.encode(message))

    def run(self) -> None:
        self.send(wire.Ready(self.engine.model_info, self.engine.stats()))
        while self.engine.has_work or self.preparing or not self.stopping:
            self._take_commands(wait=not self.engine.has_work)
            outputs = self.engine.step()
            if outputs:
                self.send(wire.Outputs(outputs))
            self._beat()
        self.engine.close()
        self.send(wire.Closed())

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self.last_beat >= HEARTBEAT_SECONDS:
            self.last_beat = now
            self.send(wire.Heartbeat(self.engine.stats().num_steps))

    def _take_commands(self, *, wait: bool) -> None:
        timeout = HEARTBEAT_SECONDS if wait else 0.0
        while True:
            try:
                command = self.commands.get(timeout=timeout) if timeout else self.commands.get_nowait()
            except queue.Empty:
                return
            timeout = 0.0
            self._obey(command)

    def _prepare(self, command: wire.AddRequest) -> None:
        """Compile the grammar of a request in another thread; it comes back as `Prepared`."""
        self.preparing[command.request_id] = command
        future = self.compiling.submit(self.engine.prepare, command.params)
        future.add_done_callback(lambda outcome: self.commands.put(Prepared(command, outcome)))

    def _add(self, command: wire.AddRequest | wire.AddEmbedding, outcome: Future[None] | None = None) -> None:
        try:
            if outcome is not None:
                outcome.result()
            match command:
                case wire.AddRequest(request_id, prompt_token_ids, params):
                    self.engine.add_request(request_id, prompt_token_ids, params)
                case wire.AddEmbedding(request_id, prompt_token_ids, pooling, normalize):
                    self.engine.add_embedding(request_id, prompt_token_ids, pooling, normalize=normalize)
        except Exception as error:  # noqa: BLE001 - one bad request must not end the others
            self.send(wire.Refused(command.request_id, wire.WireError.of(error)))

    def _change_adapters(self, ticket: int, command: wire.LoadAdapter | wire.UnloadAdapter) -> None:
        error = None
        try:
            match command:
                case wire.LoadAdapter(_, name, path):
                    self.engine.load_adapter(name, path)
                case wire.UnloadAdapter(_, name):
                    self.engine.unload_adapter(name)
        except Exception as failure:  # noqa: BLE001 - a bad adapter must not end the requests
            error = wire.WireError.of(failure)
        self.send(wire.AdaptersReply(ticket, self.engine.adapters.names, error))

    def _abort(self, request_id: str) -> list[RequestOutput]:
        command = self.preparing.pop(request_id, None)
        if command is None:
            return self.engine.abort(request_id)
        return [
            RequestOutput(request_id=request_id, index=i, finished=True, finish_reason="abort")
            for i in range(command.params.n)
        ]

    def _obey(self, command: wire.Command | Prepared) -> None:
        match command:
            case wire.AddRequest() if command.params.guided is not None:
                self._prepare(command)
            case wire.AddRequest() | wire.AddEmbedding():
                self._add(command)
            case Prepared(request, outcome):
                # Another one of that id, or none: this one was aborted meanwhile.
                if self.preparing.get(request.request_id) is request:
                    del self.preparing[request.request_id]
                    self._add(request, outcome)
            case wire.AbortRequest(request_id):
                outputs = self._abort(request_id)
                if outputs:
                    self.send(wire.Outputs(outputs))
            case wire.LoadAdapter(ticket) | wire.UnloadAdapter(ticket):
                self._change_adapters(ticket, command)
            case wire.AskStats(ticket):
                self.send(wire.StatsReply(ticket, self.engine.stats()))
            case wire.Shutdown(drain):
                self.stopping = True
                if not drain:
                    running = {request.request_id for request in self.engine.scheduler.requests}
                    for request_id in running | set(self.preparing):
                        self.send(wire.Outputs(self._abort(request_id)))


def main(arguments: list[str]) -> int:
    """``python -m hearth.engine.process FD REFERENCE CONFIG``: serve one engine on an inherited socket."""
    descriptor, reference, settings = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(descriptor))
    connection.set_inheritable(False)
    sys.stdout = sys.stderr  # standard output belongs to the application
    reader = CommandReader(connection)
    reader.start()
    try:
        loop = EngineLoop(connection, reader.commands, reference, EngineConfig.of(**json.loads(settings)))
    except Exception as error:
        logger.debug("the engine could not load", exc_info=True)
        connection.sendall(wire.encode(wire.LoadFailed(wire.WireError.of(error))))
        return 1
    try:
        loop.run()
    except OSError:
        return 0  # the application is gone
    return 0


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stderr.flush()
    # Skipping interpreter shutdown: threads of torch are still parked, and there is nothing to save.
    os._exit(exit_code)
