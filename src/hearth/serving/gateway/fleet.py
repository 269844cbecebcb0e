"""The models of a running server: loading, replacing and unloading them, each with its worker process.

What may happen when is decided in ``lives``; here it is carried out. Nothing that is loaded suffers from a
load that fails: the new worker is a process of its own, and takes requests only once it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.errors import HearthError, ServingError
from hearth.serving.gateway import lives
from hearth.serving.gateway.lives import Action, Life, Refused, Step
from hearth.serving.gateway.supervisor import Worker, WorkerSpec
from hearth.serving.http import HttpError
from hearth.serving.resolve import Resolved
from hearth.telemetry import logs

if TYPE_CHECKING:
    from hearth.serving.gateway.app import Gateway

log = logs.get_logger("fleet")
_LAST_WORDS = 2.0  # seconds for the errors of requests that were cut to leave
_STATUS = {"model_not_found": 404}  # of a refused event; else 409


class _Member:
    """A worker and what waits for it."""

    def __init__(self, number: int, resolved: Resolved, worker: Worker, claimed: int) -> None:
        self.number = number
        self.name = resolved.name
        self.resolved = resolved
        self.worker = worker
        self.claimed = claimed  # bytes that it is expected to take, while it loads
        self.run: asyncio.Task[None] = asyncio.create_task(worker.run())
        self.loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.loaded.add_done_callback(_look_at)
        worker.first_start.add_done_callback(_look_at)
        self.gone: asyncio.Task[None] | None = None

    def fail(self, error: Exception) -> None:
        """Tell who waits for it that it will not come."""
        if not self.loaded.done():
            self.loaded.set_exception(error)


@dataclass(frozen=True)
class Limits:
    """How many models there may be, and how long one that leaves may take."""

    max_models: int | None = None
    drain_timeout: float = 30.0


class Fleet:
    """Models by name. ``begin`` adds those of the start; then ``load`` and ``unload``, once ``is_open``."""

    def __init__(
        self,
        gateway: Gateway,
        folder: Path,
        make_spec: Callable[[Resolved], WorkerSpec],
        limits: Limits,
        claim: Callable[[Resolved, int], int] = lambda _resolved, _claimed: 0,
    ) -> None:
        """``claim`` says how many bytes a model will take, or raises HttpError if there are too few beside
        those already claimed."""
        self.is_open = False
        self.closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gateway = gateway
        self._folder = folder
        self._make_spec = make_spec
        self._limits = limits
        self._claim = claim
        self._lives: dict[str, Life] = {}
        self._members: dict[int, _Member] = {}
        self._wanted: dict[str, Resolved] = {}  # the last that was asked for under a name
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def workers(self) -> list[Worker]:
        """All workers that have not ended: those that answer, load or leave."""
        return [member.worker for member in self._members.values()]

    def begin(self, resolved: Resolved) -> Worker:
        """Serve a model from the start; its name is known, and answers 503, until it is ready."""
        member = self._new(resolved, self._make_spec(resolved), 0)
        self._lives[resolved.name] = Life(current=member.number)
        self._gateway.add(member.worker)
        return member.worker

    def _new(self, resolved: Resolved, spec: WorkerSpec, claimed: int) -> _Member:
        worker = Worker(spec, self._folder, self._gateway.on_change)
        member = _Member(next(self._numbers), resolved, worker, claimed)
        self._members[member.number] = member
        self._wanted[resolved.name] = resolved
        return member

    async def load(self, resolved: Resolved, *, keep_adapters: bool = False) -> Worker:
        """Load a model, or replace the one of its name, and wait until it takes the requests.

        ``keep_adapters``: those that the old one holds are loaded into the new one, if they fit, instead of
        those of its settings: some of them may have been unloaded, or loaded from elsewhere.
        Raises HttpError if it may not be loaded now (409, 503), and what the worker raises.
        """
        self._check_open()
        current = self._life(resolved.name).current
        if keep_adapters and current is not None:
            # An adapter that is just being loaded is one of them; one that comes later finds a load begun.
            async with self._members[current].worker.adapters_lock:
                member = self._begin_load(resolved, keep_adapters=True)
        else:
            member = self._begin_load(resolved, keep_adapters=False)
        await asyncio.shield(member.loaded)
        return member.worker

    def _begin_load(self, resolved: Resolved, *, keep_adapters: bool) -> _Member:
        self._check_open()
        name = resolved.name
        life = self._life(name)
        with _refusals(name):
            lives.load(life, 0)  # before a process is made for it
        spec = self._make_spec(resolved)
        if keep_adapters and life.current is not None:
            old = self._members[life.current].worker
            if old.facts:  # it has been ready, so that it says what it holds
                held = tuple(f"{each}?={path}" for each, path in old.adapters.items())
                spec = replace(spec, adapters=held)
        self._check_room(spec)
        claimed = self._claim(resolved, sum(member.claimed for member in self._members.values()))
        member = self._new(resolved, spec, claimed)
        self._apply(name, lives.load(life, member.number))
        log.info("loading model", extra=logs.fields(model=resolved.version))
        return member

    def _check_open(self) -> None:
        if self.closing.done() or self._gateway.draining:
            raise shutting_down()
        if not self.is_open:
            raise HttpError(503, "the server is starting", code="model_not_ready", retry_after=5)

    def _check_room(self, spec: WorkerSpec) -> None:
        """HttpError 409 if there are models enough, or one that has this one's names."""
        others = [name for name, life in self._lives.items() if life.is_served and name != spec.name]
        limit = self._limits.max_models
        if limit is not None and len(others) >= limit:
            raise HttpError(
                409, f"{len(others)} models are loaded, and max_models is {limit}: unload one first",
                code="too_many_models",
            )  # fmt: skip
        wanted = {*spec.names, *_adapter_names(spec)}
        for name in others:
            life = self._lives[name]
            for number in (life.current, life.coming):
                if number is None:
                    continue
                worker = self._members[number].worker
                adapters = worker.adapters if worker.facts else _adapter_names(worker.spec)
                taken = wanted & {*worker.spec.names, *adapters}
                if taken:
                    raise HttpError(
                        409, f"{worker.spec.version} answers to {min(taken)!r} already; give another name, "
                        f"or reload {name!r} if an alias has moved", param="name", code="name_taken",
                    )  # fmt: skip

    def _apply(self, name: str, step: Step) -> None:
        """Make ``step`` true. Nothing is awaited in here, so that no request falls between two states."""
        old = self._lives.get(name, Life()).current
        if step.life.is_over:
            self._lives.pop(name, None)
            self._wanted.pop(name, None)
        else:
            self._lives[name] = step.life
        for action, number in step.actions:
            member = self._members[number]
            match action:
                case Action.START:
                    self._spawn(self._bring_up(member))
                case Action.ROUTE:
                    before = None if old is None else self._members[old].worker
                    self._gateway.replace(before, member.worker)
                case Action.UNROUTE:
                    self._gateway.replace(member.worker, None)
                case Action.DRAIN:
                    member.gone = self._spawn(self._let_go(member, drain=True))
                case Action.STOP:
                    member.fail(
                        HttpError(409, f"{name!r} was unloaded while it was loading", code="unloaded")
                    )
                    member.gone = self._spawn(self._let_go(member, drain=False))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _bring_up(self, member: _Member) -> None:
        worker, name = member.worker, member.name
        await asyncio.wait({worker.first_start, member.run}, return_when=asyncio.FIRST_COMPLETED)
        if worker.first_start.done() and worker.first_start.exception() is None:
            member.claimed = 0
            self._apply(name, lives.ready(self._life(name), member.number))
            if self._life(name).current == member.number and not member.loaded.done():
                log.info("model loaded", extra=logs.fields(model=worker.spec.version))
                member.loaded.set_result(None)
            return
        await asyncio.wait({member.run})  # its process is gone after this
        error = worker.first_start.exception() if worker.first_start.done() else None
        if not isinstance(error, HearthError):
            error = ServingError(f"the worker of {worker.spec.version} was stopped before it was ready")
        self._members.pop(member.number, None)
        self._apply(name, lives.failed(self._life(name), member.number, str(error)))
        if not member.loaded.done():
            log.warning(
                "model not loaded", extra=logs.fields(model=worker.spec.version, reason=error.message)
            )
        member.fail(error)

    def _life(self, name: str) -> Life:
        return self._lives.get(name, Life())

    async def _let_go(self, member: _Member, *, drain: bool) -> None:
        """End a worker that has left the routing, after its open requests if it is drained."""
        worker = member.worker
        worker.retire()  # if it dies now, nobody needs another one
        if drain:
            idle = asyncio.ensure_future(worker.idle())
            waiting: set[asyncio.Future[None]] = {idle, member.run}
            await asyncio.wait(
                waiting, timeout=self._limits.drain_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not idle.done():
                worker.end_requests(f"{worker.spec.version} was unloaded", "model_unloaded")
                await asyncio.wait({idle}, timeout=_LAST_WORDS)
            idle.cancel()
        await _end(member)
        self._members.pop(member.number, None)
        self._apply(member.name, lives.ended(self._life(member.name), member.number))
        log.info("model unloaded", extra=logs.fields(model=worker.spec.version))

    async def unload(self, name: str) -> str:
        """Take a model out of use; returns its name when its processes have ended.

        New requests are answered 404 at once; open ones have ``drain_timeout`` seconds. Raises HttpError 404
        for a name that is not loaded, 409 for one that is being unloaded.
        """
        self._check_open()
        name = self.main_name(name)
        with _refusals(name):
            step = lives.unload(self._life(name))
        self._apply(name, step)
        going = [self._members[number].gone for number in step.life.leaving]
        await asyncio.gather(*(asyncio.shield(task) for task in going if task is not None))
        return name

    def main_name(self, name: str) -> str:
        """The name under which a model is kept that answers to ``name``, which may be an alias."""
        if name not in self._lives:
            for worker in self._gateway.workers:
                if name in worker.spec.names:
                    return worker.spec.name
        return name

    def to_reload(self, name: str) -> Resolved:
        """What is served as ``name``, or, if nothing is, what was last asked for; HttpError 404."""
        current = self._life(name).current
        if current is not None:
            return self._members[current].resolved
        with _refusals(name):
            if name not in self._wanted:
                raise Refused("model_not_found", "it is not loaded")
        return self._wanted[name]

    def is_loading(self, name: str) -> bool:
        """Whether a worker is on its way to take the name over."""
        return self._life(name).coming is not None

    def others(self) -> list[dict[str, Any]]:
        """What there is to say of models beside those that take requests, by state."""
        rows: list[dict[str, Any]] = []
        for name, life in self._lives.items():
            if life.coming is not None:
                rows.append(self._row(self._members[life.coming], "loading"))
            elif life.problem is not None:
                version = self._wanted[name].version
                rows.append({"name": name, "version": version, "state": "failed", "problem": life.problem})
            rows += [self._row(self._members[number], "unloading") for number in sorted(life.leaving)]
        return rows

    def _row(self, member: _Member, state: str) -> dict[str, Any]:
        spec = member.worker.spec
        return {"name": spec.name, "version": spec.version, "aliases": list(spec.names[1:]), "state": state}

    def give_up_loads(self) -> None:
        """The server is on its way out: whoever waits for a model is told."""
        if not self.closing.done():
            self.closing.set_result(None)
        for member in self._members.values():
            member.fail(shutting_down())

    async def close(self) -> None:
        """End every worker, in whatever state it is."""
        self.give_up_loads()
        await asyncio.gather(*map(_end, list(self._members.values())))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _end(member: _Member) -> None:
    await member.worker.stop()
    # By itself, where it can: cancelled in the middle of its cleaning, it would leave a connection behind.
    await asyncio.wait({member.run}, timeout=_LAST_WORDS)
    member.run.cancel()
    await asyncio.wait({member.run})


def _adapter_names(spec: WorkerSpec) -> list[str]:
    return [each.partition("=")[0].removesuffix("?") for each in spec.adapters]


def _look_at(future: asyncio.Future[None]) -> None:
    """Nobody may be left to look at it, such as when the client has gone."""
    if not future.cancelled():
        future.exception()


def shutting_down() -> HttpError:
    """What everyone is told from a signal on."""
    return HttpError(503, "the server is shutting down", code="shutting_down", retry_after=5)


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Turn a Refused into an HttpError that names the model."""
    try:
        yield
    except Refused as refused:
        shown = name if len(name) <= 100 else name[:100] + "…"
        raise HttpError(
            _STATUS.get(refused.code, 409), f"the model {shown!r}: {refused.message}", code=refused.code
        ) from None
