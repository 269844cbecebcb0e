"""A gateway in this process, with scripted workers in theirs."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from multidict import CIMultiDict

from hearth.config import ServedModel
from hearth.errors import NotFoundError
from hearth.serving.gateway.access import Access
from hearth.serving.gateway.app import Gateway
from hearth.serving.gateway.fleet import Fleet, Limits
from hearth.serving.gateway.policy import RestartPolicy
from hearth.serving.gateway.supervisor import Worker, WorkerSpec
from hearth.serving.resolve import Resolved
from hearth.serving.servers import bind, make_server

SCRIPT = Path(__file__).parents[1] / "scripted_worker.py"


class Running:
    """A gateway that serves on ``url``."""

    def __init__(self, gateway: Gateway, url: str, session: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.url = url
        self.session = session

    async def post(self, path: str = "/v1/completions", **body: object) -> tuple[int, dict, CIMultiDict[str]]:
        """Status, JSON body and headers of a request."""
        async with self.session.post(self.url + path, json=body) as response:
            return response.status, await response.json(), response.headers.copy()

    async def read(self, **body: object) -> str:
        """The whole text of a completion's answer."""
        async with self.session.post(self.url + "/v1/completions", json=body) as response:
            return (await response.read()).decode()

    async def get(self, path: str) -> tuple[int, dict]:
        """Status and JSON body."""
        async with self.session.get(self.url + path) as response:
            return response.status, await response.json()

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait for ``condition``."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)


Start = Callable[..., AbstractAsyncContextManager[Running]]


def spec(name: str = "scripted", *, arguments: tuple[str, ...] = (), **changes: object) -> WorkerSpec:
    """A scripted worker that is checked and restarted quickly."""
    values: dict = {
        "version": f"{name}@1",
        "aliases": (f"{name}@production",),
        "path": Path("unused"),
        "command": (sys.executable, str(SCRIPT)),
        "arguments": arguments,
        "health_interval": 0.05,
        "policy": RestartPolicy(backoff=0.05, limit=3, stable_seconds=60),
        **changes,
    }
    return WorkerSpec(name=name, **values)


@contextlib.asynccontextmanager
async def start(
    *specs: WorkerSpec, access: Access | None = None, **options: object
) -> AsyncIterator[Running]:
    """Run a gateway over ``specs``."""
    values: dict = {"max_queue": 8, "max_body_bytes": 10_000, "request_timeout": 30.0, **options}
    gateway = Gateway(access=access or Access(loopback=True), **values)
    folder = Path(tempfile.mkdtemp(prefix="hearth-test-"))
    for each in specs or (spec(),):
        gateway.add(Worker(each, folder, gateway.on_change))
    sock = bind("127.0.0.1", 0)
    server = make_server(gateway.asgi, drain_seconds=1)
    serving = asyncio.create_task(server.serve([sock]))
    runs = [asyncio.create_task(worker.run()) for worker in gateway.workers]
    try:
        await asyncio.gather(*(worker.first_start for worker in gateway.workers))
        async with aiohttp.ClientSession() as session:
            yield Running(gateway, f"http://127.0.0.1:{sock.getsockname()[1]}", session)
    finally:
        server.should_exit = server.force_exit = True
        await asyncio.gather(*(worker.stop() for worker in gateway.workers))
        for task in (*runs, serving):
            task.cancel()
        await asyncio.gather(*runs, serving, return_exceptions=True)
        sock.close()
        shutil.rmtree(folder)


@dataclass
class Script:
    """What the worker of a model does, by the reference that is asked for."""

    version: str
    arguments: tuple[str, ...] = ()


@contextlib.asynccontextmanager
async def start_fleet(
    scripts: dict[str, Script],
    *names: str,
    access: Access | None = None,
    limits: Limits | None = None,
    claim: Callable[[Resolved, int], int] = lambda _resolved, _claimed: 0,
    **changes: object,
) -> AsyncIterator[Running]:
    """Run a gateway whose models may come and go; those of ``names`` from the start.

    A reference is NAME:REVISION, where the revision is free text; it answers to NAME and to its version.
    """
    access = access or Access(loopback=True)
    gateway = Gateway(access=access, max_queue=8, max_body_bytes=10_000, request_timeout=30.0)
    folder = Path(tempfile.mkdtemp(prefix="hearth-test-"))

    def resolve(entry: ServedModel) -> Resolved:
        if entry.model not in scripts:
            raise NotFoundError(f"no model {entry.model!r}")
        name = entry.name or entry.model.partition(":")[0]
        return Resolved(name, scripts[entry.model].version, (), Path(entry.model), entry)

    def make_spec(model: Resolved) -> WorkerSpec:
        script = scripts[model.entry.model]
        adapters = tuple(f"{name}={path}" for name, path in model.entry.adapters.items())
        values = {
            "version": script.version,
            "aliases": (),
            "arguments": script.arguments,
            "adapters": adapters,
        }
        return spec(model.name, **{**values, **changes})

    fleet = Fleet(gateway, folder, make_spec, limits or Limits(drain_timeout=10.0), claim)
    gateway.attach(fleet, resolve)
    sock = bind("127.0.0.1", 0)
    server = make_server(gateway.asgi, drain_seconds=1)
    serving = asyncio.create_task(server.serve([sock]))
    try:
        await asyncio.gather(*(fleet.begin(resolve(ServedModel(model=n))).first_start for n in names))
        fleet.is_open = True
        async with aiohttp.ClientSession() as session:
            yield Running(gateway, f"http://127.0.0.1:{sock.getsockname()[1]}", session)
    finally:
        server.should_exit = server.force_exit = True
        await fleet.close()
        await asyncio.wait({serving}, timeout=2)  # it closes its socket, whose number another one may get
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        sock.close()
        shutil.rmtree(folder)


@pytest.fixture
def start_gateway() -> Start:
    return start


@pytest.fixture(name="start_fleet")
def fleet_starter() -> Start:
    return start_fleet


@pytest.fixture
def script() -> type[Script]:
    return Script


@pytest.fixture
def worker_spec() -> Callable[..., WorkerSpec]:
    return spec
