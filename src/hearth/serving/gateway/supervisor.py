"""Start workers, watch them, replace the dead and the stuck.

A worker's life: starting → ready → (dies, or hangs and is killed) → waiting → starting …, or failed when the
restart policy gives up. One that is not used may be let go: ready → asleep → (a request) → starting. The
gateway reads ``state`` and ``session``; both change in one place, here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp
import psutil

from hearth import errors
from hearth.errors import HearthError, ServingError
from hearth.serving.gateway.policy import RestartPolicy
from hearth.telemetry import logs
from hearth.workspace.lifeline import kill_group

log = logs.get_logger("supervisor")
State = Literal["starting", "ready", "waiting", "asleep", "failed", "stopped"]
BASE_URL = "http://worker"
_EVENT_LIMIT = 1 << 20  # bytes in one event; the reason why a model cannot be loaded may be long
_socket_numbers = itertools.count(1)


@dataclass(frozen=True)
class WorkerSpec:
    """What to start, and how patient to be with it."""

    name: str
    version: str
    aliases: tuple[str, ...]
    path: Path
    arguments: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()  # NAME=PATH
    command: tuple[str, ...] = (sys.executable, "-m", "hearth.serving.worker")
    start_timeout: float = 1800.0
    health_interval: float = 1.0
    health_timeout: float = 15.0
    stop_timeout: float = 5.0
    idle_seconds: float = 0.0  # without requests, until the process is let go; 0: never
    policy: RestartPolicy = field(default_factory=RestartPolicy)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that mean this model, the main one first."""
        return tuple(dict.fromkeys([self.name, self.version, *self.aliases]))


class Worker:
    """One supervised worker. ``run`` does not return before ``stop``, nor raise after the first start."""

    def __init__(self, spec: WorkerSpec, socket_dir: Path, on_change: Callable[[Worker], None]) -> None:
        self.spec = spec
        self.state: State = "starting"
        self.session: aiohttp.ClientSession | None = None
        self.pid: int | None = None
        self.restarts = 0
        self.problem: str | None = None
        self.facts: dict[str, Any] = {}
        self.adapters: dict[str, str] = {}  # paths by name; a restart loads them again
        self.adapters_lock = asyncio.Lock()  # held by what changes them, and by what hands them on
        loop = asyncio.get_running_loop()
        self.first_start: asyncio.Future[None] = loop.create_future()
        self.cut: asyncio.Future[tuple[str, str]] = (
            loop.create_future()
        )  # why its requests end: message, code
        self.in_flight = 0  # sequences that it computes for the gateway
        self.num_open = 0  # requests
        self._last_used = time.monotonic()
        self._idle = asyncio.Event()
        self._idle.set()
        self._wake = asyncio.Event()
        self._changed: asyncio.Future[None] = loop.create_future()
        self._doubt: asyncio.Future[None] = loop.create_future()
        self._socket_dir = socket_dir
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._stop = asyncio.Event()
        self._engine: psutil.Process | None = None

    async def run(self) -> None:
        """Keep a worker running until ``stop``. A first start that fails ends it: ``first_start`` raises."""
        quick_failures = 0
        while not self._stop.is_set():
            self._set("starting")
            ready_at: float | None = None
            try:
                await self._start()
                ready_at = time.monotonic()
                self._set("ready")
                if not self.first_start.done():
                    self.first_start.set_result(None)
                self.problem = await self._watch()
                if self.problem is None:  # not used for long
                    self._wake.clear()
                    self._set("asleep")
            except Exception as error:  # noqa: BLE001
                # Whatever it is, such as too many open files, nobody may be left waiting for this worker.
                failure = error if isinstance(error, HearthError) else self._unexpected(error)
                self.problem = failure.message
                if not self.first_start.done():
                    self._set("failed")
                    self.first_start.set_exception(failure)
                    return
            finally:
                await self._clean_up()
            if self._stop.is_set():
                break
            if self.state == "asleep":
                log.info(
                    "worker let go", extra=logs.fields(model=self.spec.name, idle=self.spec.idle_seconds)
                )
                await self._wake.wait()
                continue
            lived = 0.0 if ready_at is None else time.monotonic() - ready_at
            quick_failures, delay = self.spec.policy.after_failure(quick_failures, lived)
            facts = logs.fields(model=self.spec.name, reason=self.problem, wait_seconds=delay)
            if delay is None:
                log.error("worker keeps failing, giving up", extra=facts)
                self._set("failed")
                return
            log.warning("worker stopped, restarting", extra=facts)
            self._set("waiting")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay)
                break
            self.restarts += 1
        self._set("stopped")

    def _unexpected(self, error: Exception) -> ServingError:
        log.error("worker could not be started", exc_info=error, extra=logs.fields(model=self.spec.name))
        return ServingError(
            f"the worker of {self.spec.version} could not be started: {type(error).__name__}: {error}"
        )

    def _set(self, state: State) -> None:
        self.state = state
        changed, self._changed = self._changed, asyncio.get_running_loop().create_future()
        changed.set_result(None)
        self._on_change(self)

    async def _start(self) -> None:
        """Spawn the process and wait for its ``ready``; raise its error, or ServingError."""
        # A new path for each process: a connection to a dead one can never be taken for the new one. Not made
        # from the model's name: what is left of two long names in so short a path may be the same.
        path = self._socket_dir / f"worker-{next(_socket_numbers)}"
        command = [
            *(*self.spec.command, "--supervised"),
            *(
                "--model",
                str(self.spec.path),
                "--name",
                self.spec.name,
                "--served-version",
                self.spec.version,
            ),
            *(argument for alias in self.spec.aliases for argument in ("--alias", alias)),
            *self._adapter_arguments(),
            *("--uds", str(path)),
            *self.spec.arguments,
        ]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # the lifeline; see hearth.workspace.lifeline
            stdout=asyncio.subprocess.PIPE,
            limit=_EVENT_LIMIT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        try:
            event = await asyncio.wait_for(self._next_event(), self.spec.start_timeout)
        except TimeoutError:
            raise ServingError(
                f"the worker of {self.spec.version} was not ready within {self.spec.start_timeout:g} s"
            ) from None
        if event.get("event") == "failed":
            kind = getattr(errors, str(event.get("kind")), ServingError)
            raise kind(event["message"], fix=event.get("fix"))
        self.facts = event
        self.adapters = dict(event.get("adapters") or {})
        if engine_pid := event.get("engine_pid"):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._engine = psutil.Process(engine_pid)
        connector = aiohttp.UnixConnector(path=str(path), limit=0, keepalive_timeout=30)
        self.session = aiohttp.ClientSession(
            BASE_URL, connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        )

    def _adapter_arguments(self) -> list[str]:
        """Those of the specification, or, after a restart, those that were loaded last."""
        if not self.facts:
            return [word for each in self.spec.adapters for word in ("--adapter", each)]
        # One that has gone from the disk since must not keep the model from starting.
        return [word for name, path in self.adapters.items() for word in ("--adapter", f"{name}?={path}")]

    async def _next_event(self) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        while line := await process.stdout.readline():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    return event
        code = await process.wait()
        raise ServingError(f"the worker of {self.spec.version} ended before it was ready ({_ending(code)})")

    async def _watch(self) -> str | None:
        """Return why the worker is no longer good: it ended, does not answer, or its engine hangs.

        None: it has been idle for so long that it is let go.
        """
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        last_answer = time.monotonic()
        try:
            while True:
                waiting: set[asyncio.Future[Any]] = {ended, self._doubt}
                await asyncio.wait(
                    waiting, timeout=self.spec.health_interval, return_when=asyncio.FIRST_COMPLETED
                )
                if self._doubt.done():
                    self._doubt = asyncio.get_running_loop().create_future()
                if ended.done():
                    return f"the worker ended ({_ending(ended.result())})"
                if self._is_unused():
                    return None
                status = await self._probe(ended)
                if status is not None:
                    last_answer = time.monotonic()
                    if status != "ok":
                        return f"the worker reports {status}"
                elif not ended.done() and time.monotonic() - last_answer > self.spec.health_timeout:
                    return f"the worker did not answer for {self.spec.health_timeout:g} s"
        finally:
            ended.cancel()

    def doubt(self) -> None:
        """A request did not end as it should: look after the worker at once, not at the next interval."""
        if not self._doubt.done():
            self._doubt.set_result(None)

    async def _probe(self, ended: asyncio.Future[int]) -> str | None:
        """The status in the worker's /health, or None if it does not answer (or ends meanwhile)."""
        assert self.session is not None

        async def ask() -> str | None:
            assert self.session is not None
            async with self.session.get("/health") as response:
                return str((await response.json()).get("status"))

        asking = asyncio.ensure_future(ask())
        try:
            waiting: set[asyncio.Future[Any]] = {asking, ended}
            await asyncio.wait(waiting, timeout=self.spec.health_timeout, return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else None
        except (aiohttp.ClientError, OSError, ValueError):
            return None
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    def _is_unused(self) -> bool:
        limit = self.spec.idle_seconds
        return bool(limit) and not self.num_open and time.monotonic() - self._last_used > limit

    @contextlib.contextmanager
    def busy(self, num_sequences: int) -> Iterator[None]:
        """Count a request while it is answered."""
        self.in_flight += num_sequences
        self.num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= num_sequences
            self.num_open -= 1
            self._last_used = time.monotonic()
            if not self.num_open:
                self._idle.set()

    async def idle(self) -> None:
        """Return when no request is open."""
        await self._idle.wait()

    @property
    def wakes(self) -> bool:
        """Whether a request may wait for it to start."""
        return bool(self.spec.idle_seconds) and self.state in ("asleep", "starting")

    async def wake(self, timeout: float) -> bool:
        """Start a worker that was let go; wait up to ``timeout`` seconds. Returns whether it is ready."""
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.wakes and not self.cut.done():
                    waiting: set[asyncio.Future[Any]] = {self._changed, self.cut}
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return self.state == "ready"

    @property
    def retired(self) -> bool:
        """Whether nobody will start it again."""
        return self._stop.is_set()

    def retire(self) -> None:
        """From now on it is not started again when it ends."""
        self._stop.set()
        self._wake.set()

    def end_requests(self, message: str, code: str) -> None:
        """End every request that is still open with this error."""
        if not self.cut.done():
            self.cut.set_result((message, code))

    async def _clean_up(self) -> None:
        """Leave nothing behind. An engine ends with its worker by itself, unless it is stopped or stuck."""
        session, self.session = self.session, None
        process, self._process = self._process, None
        if process is not None:
            kill_group(process.pid)
            await process.wait()
            if process.stdin is not None:
                process.stdin.close()
        engine, self._engine = self._engine, None
        if engine is not None:
            with contextlib.suppress(psutil.Error):
                engine.kill()  # psutil knows a process by its start time too, never a newer one of that id
        if session is not None:
            await session.close()
        self.pid = None

    async def stop(self) -> None:
        """End the worker: SIGTERM, a moment, then SIGKILL to its group."""
        self.retire()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(process.wait()), self.spec.stop_timeout)
        kill_group(process.pid)


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
