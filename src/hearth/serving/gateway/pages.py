"""What there is to read about a server: its models, their health, counts and metrics."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hearth.serving.gateway.supervisor import Worker
from hearth.serving.http import json_response
from hearth.telemetry.metrics import CONTENT_TYPE, merge_expositions
from hearth.version import __version__

if TYPE_CHECKING:
    from hearth.serving.gateway.app import Gateway

_WORKER_TIMEOUT = aiohttp.ClientTimeout(total=3.0)


class Pages:
    """The GET endpoints of a gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._started = time.time()

    def _openai_entry(self, worker: Worker, name: str) -> dict[str, Any]:
        entry = {
            "id": name,
            "object": "model",
            "created": int(self._started),
            "owned_by": "hearth",
            "root": worker.spec.version,
            "max_model_len": worker.facts.get("max_model_len"),
        }
        adapter = name if name in worker.adapters else name.rpartition(":")[2]
        if name not in worker.spec.names and adapter in worker.adapters:
            entry |= {"root": worker.adapters[adapter], "parent": worker.spec.name}
        return entry

    async def openai_models(self, _: Request) -> Response:
        data = [
            self._openai_entry(worker, name)
            for worker in self._gateway.workers
            for name in (worker.spec.name, *worker.adapters)
        ]
        return json_response({"object": "list", "data": data})

    async def openai_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        return json_response(self._openai_entry(self._gateway.route(name), name))

    async def models(self, _: Request) -> Response:
        models = [
            {
                "name": worker.spec.name,
                "version": worker.spec.version,
                "aliases": [name for name in worker.spec.names if name != worker.spec.name],
                "state": worker.state,
                "max_model_len": worker.facts.get("max_model_len"),
                "info": worker.facts.get("model_info"),
            }
            for worker in self._gateway.workers
        ]
        fleet = self._gateway.fleet
        return json_response({"models": models + ([] if fleet is None else fleet.others())})

    async def _ask(self, worker: Worker, path: str) -> bytes | None:
        """The body of a worker's own page, or None while it cannot answer."""
        if worker.session is None:
            return None
        try:
            async with worker.session.get(path, timeout=_WORKER_TIMEOUT) as response:
                return await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def stats(self, _: Request) -> Response:
        pages = await asyncio.gather(*(self._ask(worker, "/stats") for worker in self._gateway.workers))
        models = {
            worker.spec.name: {
                "version": worker.spec.version,
                "state": worker.state,
                "problem": worker.problem,
                "restarts": worker.restarts,
                "pid": worker.pid,
                "in_flight": worker.in_flight,
                "worker": None if page is None else msgspec.json.decode(page),
            }
            for worker, page in zip(self._gateway.workers, pages, strict=True)
        }
        return json_response(
            {
                "version": __version__,
                "pid": os.getpid(),
                "uptime_seconds": round(time.time() - self._started, 3),
                "ready": self._gateway.ready,
                "models": models,
            }
        )

    async def health(self, _: Request) -> Response:
        gateway = self._gateway
        models = {
            worker.spec.name: {"state": worker.state, "problem": worker.problem} for worker in gateway.workers
        }
        if gateway.draining:
            status = "draining"
        elif not gateway.ready:
            status = "down"
        else:
            whole = all(worker.state in ("ready", "asleep") for worker in gateway.workers)
            status = "ok" if whole else "degraded"
        return json_response({"status": status, "models": models}, 200 if status == "ok" else 503)

    async def livez(self, _: Request) -> Response:
        return json_response({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        return json_response({"ready": self._gateway.ready}, 200 if self._gateway.ready else 503)

    async def metrics(self, _: Request) -> Response:
        pages = await asyncio.gather(*(self._ask(worker, "/metrics") for worker in self._gateway.workers))
        merged = merge_expositions([self._gateway.metrics.render(), *(page for page in pages if page)])
        return Response(merged, headers={"content-type": CONTENT_TYPE})
