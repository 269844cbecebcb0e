"""An engine in its own process, used from asyncio: the HTTP side never waits for a kernel.

The process is joined by a socket pair and dies with it; that it died is noticed at once, by the closed socket
and by waiting for it, and every request under way raises `EngineDeadError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hearth.engine import wire
from hearth.engine.batch import embedding_of
from hearth.engine.config import EngineConfig
from hearth.engine.outputs import Embedding, EngineStats, RequestOutput
from hearth.engine.params import SamplingParams, check_prompt
from hearth.errors import EngineDeadError, EngineError, HearthError, RequestError
from hearth.threads import limit_spinning

logger = logging.getLogger(__name__)

_KILL_AFTER = 5.0  # seconds that a process may take to leave after it was asked to


class AsyncEngine:
    """`Engine` for asyncio. Made by ``await AsyncEngine.start(MODEL)``; close it, or use ``async with``."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        self._process = process
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._queues: dict[str, asyncio.Queue[RequestOutput | HearthError]] = {}  # by name on the wire
        self._wire_names: dict[str, str] = {}  # of the requests under way, by their ids
        self._tickets: dict[int, asyncio.Future[Any]] = {}  # of stats, and of changes to the adapters
        self._adapters: list[str] = []
        self._ticket_numbers = itertools.count()
        self._request_numbers = itertools.count()
        self._ready: asyncio.Future[wire.Ready] = self._loop.create_future()
        self._dead: EngineDeadError | None = None
        self._closing = False
        self._gone = asyncio.Event()
        self._last_heard = time.monotonic()
        self.num_steps = 0
        self.tokenizer: Any = None
        self.model_info: dict[str, Any] = {}
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._listener: asyncio.Task[None]

    @classmethod
    async def start(
        cls, reference: str | Path, config: EngineConfig | None = None, **fields: Any
    ) -> AsyncEngine:
        """Spawn the process and wait until the model is loaded.

        Raises what loading raised there (`ModelError`, `ConfigError`, …), or `EngineDeadError` if the
        process ended without a word.
        """
        config = EngineConfig.of(**fields) if config is None else config.with_(**fields)
        ours, theirs = socket.socketpair()
        settings = json.dumps(asdict(config))
        # The process shares its cores with the HTTP side: idle threads must give way.
        environment = dict(os.environ)
        limit_spinning(environment)
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "hearth.engine.process",
                    str(theirs.fileno()),
                    str(reference),
                    settings,
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                # Its own process group: Ctrl-C in the terminal is for the application, which then closes it.
                process_group=0,
            )
        engine = cls(process, ours)
        try:
            await engine._connect(reference)
        except BaseException:
            await engine.close()
            raise
        return engine

    async def _connect(self, reference: str | Path) -> None:
        self._connection.setblocking(False)
        self._reader, self._writer = await asyncio.open_connection(sock=self._connection)
        self._listener = asyncio.create_task(self._listen(), name="hearth-engine-listener")
        threading.Thread(target=self._wait_for_process, name="hearth-engine-wait", daemon=True).start()
        # The tokenizer loads here while the process imports torch there.
        tokenizer = asyncio.create_task(asyncio.to_thread(_load_tokenizer, reference))
        try:
            ready = await asyncio.shield(self._ready)
            self.tokenizer = await tokenizer
        finally:
            tokenizer.cancel()
            with contextlib.suppress(asyncio.CancelledError, HearthError):
                await tokenizer
        self.model_info = ready.model_info
        self.initial_stats = ready.stats

    # -- hearing -----------------------------------------------------------------------------------------
    async def _listen(self) -> None:
        try:
            while True:
                header = await self._reader.readexactly(wire.HEADER_SIZE)
                body = await self._reader.readexactly(wire.frame_length(header))
                self._last_heard = time.monotonic()
                self._take(wire.decode_event(body))
        except (OSError, asyncio.IncompleteReadError):
            self._die()
        except Exception:  # a client that has gone deaf would leave every request waiting
            logger.exception("an event of the engine process cannot be read; the process is ended")
            self._process.kill()
            self._die()

    def _take(self, event: wire.Event) -> None:
        match event:
            case wire.Outputs(outputs):
                for output in outputs:
                    queue = self._queues.get(output.request_id)
                    if queue is not None:
                        queue.put_nowait(output)
            case wire.Heartbeat(num_steps):
                self.num_steps = num_steps
            case wire.Refused(request_id, error):
                if request_id in self._queues:
                    self._queues[request_id].put_nowait(error.error())
            case wire.StatsReply(ticket, stats):
                self._answer(ticket, stats)
            case wire.AdaptersReply(ticket, names, failure):
                self._adapters = names
                self._answer(ticket, None if failure is None else failure.error())
            case wire.Ready():
                self._ready.set_result(event)
            case wire.LoadFailed(error):
                self._ready.set_exception(error.error())
                self._ready.exception()  # whoever started the engine may be gone already
            case wire.Closed():
                self._closing = True

    def _wait_for_process(self) -> None:
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._died)

    def _died(self) -> None:
        self._gone.set()
        if self._reader.at_eof() or self._listener.done():
            self._die()
        else:
            # What it said before it died is still in the socket, whose end the listener will reach.
            self._loop.call_later(0.5, self._die)

    def _die(self) -> None:
        """Tell everyone who waits that nothing will come."""
        if self._dead is not None:
            return
        code = self._process.poll()
        how = "" if code is None else f" (signal {-code})" if code < 0 else f" (exit code {code})"
        what = "was closed" if self._closing else f"died{how}"
        self._dead = EngineDeadError(f"the engine process {what}", fix="start a new engine")
        if not self._ready.done():
            self._ready.set_exception(self._dead)
            self._ready.exception()
        for queue in self._queues.values():
            queue.put_nowait(self._dead)
        for future in self._tickets.values():
            if not future.done():
                future.set_exception(self._dead)
        self._tickets.clear()

    # -- asking ------------------------------------------------------------------------------------------
    def _send(self, command: wire.Command) -> None:
        if self._dead is not None:
            raise self._dead
        self._writer.write(wire.encode(command))

    @property
    def max_model_len(self) -> int:
        return int(self.model_info["max_model_len"])

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; a stuck one is alive, see `heartbeat_age`."""
        return self._dead is None and self._process.poll() is None

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine's loop was last heard. It speaks at least twice a second between steps."""
        return time.monotonic() - self._last_heard

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; ids are passed through."""
        if not isinstance(prompt, str):
            return list(prompt)
        from hearth.models import encode_text  # loads torch, which this side can do without until here

        return encode_text(self.tokenizer, prompt)

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Stream what the request gains, until all its sequences are finished.

        Leaving the iterator early, or cancelling its task, aborts the request. Raises `RequestError` if the
        request is invalid, `EngineError` if the step that computed it failed, `EngineDeadError` if the
        engine is gone. An iterator that is not used to its end should be closed (`contextlib.aclosing`).
        """
        params = params or SamplingParams()
        name = self._new_name(request_id)
        prompt_ids = self.encode(prompt)
        check_prompt(prompt_ids, self.max_model_len, int(self.model_info["vocab_size"]))
        command = wire.AddRequest(self._wire_name(name), prompt_ids, params)
        async with contextlib.aclosing(self._outputs(name, command, params.n)) as outputs:
            async for output in outputs:
                yield output

    async def embed(
        self,
        prompt: str | Sequence[int],
        pooling: str | None = None,
        *,
        normalize: bool = True,
        request_id: str | None = None,
    ) -> Embedding:
        """The pooled last hidden state of a prompt, see `Engine.embed`; cancelling aborts it.

        Raises what `generate` raises, and `EngineError` if it was aborted.
        """
        name = self._new_name(request_id)
        prompt_ids = self.encode(prompt)
        check_prompt(prompt_ids, self.max_model_len, int(self.model_info["vocab_size"]), num_answer=0)
        command = wire.AddEmbedding(self._wire_name(name), prompt_ids, pooling, normalize)
        async with contextlib.aclosing(self._outputs(name, command, 1)) as outputs:
            return embedding_of(await anext(outputs))

    def _new_name(self, request_id: str | None) -> str:
        name = request_id or f"request-{next(self._request_numbers)}"
        if name in self._wire_names:
            raise RequestError(f"request id {name!r} is in use", param="request_id")
        return name

    def _wire_name(self, name: str) -> str:
        """A name that no other request ever has: an id may be used again while the last outputs of the one
        before, which was left early, are still under way."""
        return f"{name}#{next(self._request_numbers)}"

    async def _outputs(
        self, request_id: str, command: wire.AddRequest | wire.AddEmbedding, unfinished: int
    ) -> AsyncGenerator[RequestOutput, None]:
        """What a request gains until that many of its sequences are finished; aborts it if left early."""
        name = command.request_id
        queue: asyncio.Queue[RequestOutput | HearthError] = asyncio.Queue()
        self._queues[name] = queue
        self._wire_names[request_id] = name
        try:
            self._send(command)
            while unfinished:
                output = await queue.get()
                if isinstance(output, HearthError):
                    unfinished = 0
                    raise output
                if output.error is not None:
                    raise EngineError(f"the engine failed while it computed this request: {output.error}")
                unfinished -= output.finished
                output.request_id = request_id
                yield output
        finally:
            del self._queues[name], self._wire_names[request_id]
            if unfinished and self._dead is None:
                self._send(wire.AbortRequest(name))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream ends with finish_reason "abort". Unknown ids are ignored."""
        name = self._wire_names.get(request_id)
        if self._dead is None and name is not None:
            self._send(wire.AbortRequest(name))

    async def stats(self) -> EngineStats:
        """What the engine is doing; answered between two steps."""
        stats: EngineStats = await self._ask(wire.AskStats)
        return stats

    async def _ask(self, command: Callable[..., wire.Command], *arguments: str) -> Any:
        """Send a command with a ticket, and wait for the answer to it."""
        ticket = next(self._ticket_numbers)
        future: asyncio.Future[Any] = self._loop.create_future()
        self._tickets[ticket] = future
        try:
            self._send(command(ticket, *arguments))
            return await future
        finally:
            self._tickets.pop(ticket, None)

    def _answer(self, ticket: int, answer: Any) -> None:
        future = self._tickets.pop(ticket, None)
        if future is None or future.done():
            return
        if isinstance(answer, HearthError):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    # -- adapters ----------------------------------------------------------------------------------------
    def adapters(self) -> list[str]:
        """The names of the loaded LoRA adapters."""
        return list(self._adapters)

    async def load_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter between two steps, see `Engine.load_adapter`; raises what that raises."""
        await self._ask(wire.LoadAdapter, name, str(Path(path).absolute()))

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; running requests keep it. Raises `RequestError` if there is none."""
        await self._ask(wire.UnloadAdapter, name)

    # -- leaving -----------------------------------------------------------------------------------------
    async def close(self, drain: bool = False) -> None:
        """End the process: at once, aborting what runs, or after the running requests with ``drain``."""
        self._closing = True
        if hasattr(self, "_listener") and self._dead is None and self._process.poll() is None:
            loaded = self._ready.done() and self._ready.exception() is None
            with contextlib.suppress(EngineDeadError, OSError):  # a TimeoutError is an OSError
                self._send(wire.Shutdown(drain))
                await asyncio.wait_for(self._writer.drain(), _KILL_AFTER)
            if loaded:
                timeout = None if drain else _KILL_AFTER
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._gone.wait(), timeout)
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        await self._disconnect()

    async def _disconnect(self) -> None:
        if not hasattr(self, "_listener"):
            self._connection.close()
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._listener), 1.0)
        self._listener.cancel()
        self._die()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


def _load_tokenizer(reference: str | Path) -> Any:
    from hearth.models import load_tokenizer, resolve_reference

    return load_tokenizer(resolve_reference(reference))
