"""Loading and unloading adapters: passed on to the worker, and remembered for routing and for restarts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import aiohttp
import msgspec
from starlette.types import Receive, Scope, Send

from hearth.serving.decoding import decode, invalid
from hearth.serving.gateway.access import Access
from hearth.serving.gateway.proxy import unavailable
from hearth.serving.http import (
    JSON_TYPE,
    REQUEST_ID_HEADER,
    ClientGone,
    HttpError,
    read_json_body,
    send_bytes,
    send_error,
    to_http_error,
)
from hearth.serving.protocol import LoadAdapterRequest, UnloadAdapterRequest
from hearth.telemetry import logs

if TYPE_CHECKING:
    from hearth.serving.gateway.fleet import Fleet
    from hearth.serving.gateway.supervisor import Worker

log = logs.get_logger("gateway")
LOAD_PATH, UNLOAD_PATH = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_TIMEOUT = aiohttp.ClientTimeout(total=300.0)


class Models(Protocol):
    """What is used of the gateway."""

    max_body_bytes: int
    fleet: Fleet | None

    @property
    def workers(self) -> list[Worker]: ...
    def route(self, model: str | None) -> Worker: ...


class AdapterRoutes:
    """Endpoints of the operator: they read the disk."""

    def __init__(self, models: Models, access: Access) -> None:
        self._models = models
        self._access = access

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request to load or to unload."""
        try:
            self._access.check_admin(scope)
            body = await read_json_body(scope, receive, self._models.max_body_bytes)
            await self._forward(scope, body, send)
        except ClientGone:
            scope["state"]["client_gone"] = True
        except HttpError as error:
            await send_error(send, error)
        except Exception as error:
            log.exception("request failed", extra=logs.fields(route=scope["path"]))
            await send_error(send, to_http_error(error))

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        request: LoadAdapterRequest | UnloadAdapterRequest
        loads = scope["path"] == LOAD_PATH
        request = decode(body, LoadAdapterRequest) if loads else decode(body, UnloadAdapterRequest)
        name = request.lora_name
        worker = self._worker_for(name, request.model, loads=loads)
        with worker.busy(0):  # it must not fall asleep meanwhile
            async with worker.adapters_lock:
                status, answer = await self._change(worker, request, scope)
        await send_bytes(send, status, answer)

    async def _change(
        self, worker: Worker, request: LoadAdapterRequest | UnloadAdapterRequest, scope: Scope
    ) -> tuple[int, bytes]:
        """Let ``worker`` do it; returns its answer's status and body."""
        fleet = self._models.fleet
        if fleet is not None and fleet.is_loading(worker.spec.name):
            raise HttpError(
                409, f"{worker.spec.name!r} is being replaced; wait for it", code="already_loading"
            )
        if worker.wakes and not await worker.wake(_TIMEOUT.total or 0.0):
            raise unavailable(worker)
        session = worker.session
        if session is None or worker.state != "ready":
            raise unavailable(worker)
        headers = {"content-type": JSON_TYPE, REQUEST_ID_HEADER: scope["state"]["request_id"]}
        # The worker is told its own model's name: the request may have left it out.
        told = msgspec.json.encode(msgspec.structs.replace(request, model=worker.spec.name))
        try:
            async with session.post(scope["path"], data=told, headers=headers, timeout=_TIMEOUT) as response:
                status, answer = response.status, await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise HttpError(
                503, f"the worker of {worker.spec.version} failed", code="worker_failed"
            ) from error
        if status == 200:
            name = request.lora_name
            if isinstance(request, LoadAdapterRequest):
                worker.adapters[name] = request.lora_path
                what = "adapter loaded"
            else:
                worker.adapters.pop(name, None)
                what = "adapter unloaded"
            log.info(what, extra=logs.fields(model=worker.spec.version, adapter=name))
        return status, answer

    def _worker_for(self, name: str, model: str | None, *, loads: bool) -> Worker:
        if not loads and model is None:
            holders = [worker for worker in self._models.workers if name in worker.adapters]
            if len(holders) == 1:
                return holders[0]
        worker = self._models.route(model)
        taken = [w for w in self._models.workers if name in w.adapters or name in w.spec.names]
        if loads and taken:
            raise invalid(f"there is a model or adapter {name!r} already", "lora_name")
        return worker
