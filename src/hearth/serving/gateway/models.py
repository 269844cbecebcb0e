"""``POST /models/load``, ``/models/reload`` and ``/models/unload``: the operator changes what is served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from hearth.config import ServedModel
from hearth.config.problems import describe
from hearth.errors import ConflictError, GateError, HearthError, InputError, IntegrityError, NotFoundError
from hearth.serving.decoding import NOT_JSON, decode, not_json
from hearth.serving.gateway.access import Access
from hearth.serving.gateway.fleet import Fleet, shutting_down
from hearth.serving.gateway.supervisor import Worker
from hearth.serving.http import ClientGone, HttpError, read_json_body, send_bytes, send_error, to_http_error
from hearth.serving.resolve import Resolved
from hearth.telemetry import logs

log = logs.get_logger("gateway")
LOAD, RELOAD, UNLOAD = "/models/load", "/models/reload", "/models/unload"
PATHS = (LOAD, RELOAD, UNLOAD)
_STATUS = {NotFoundError: 404, GateError: 409, ConflictError: 409, IntegrityError: 409, InputError: 400}


class Named(msgspec.Struct, forbid_unknown_fields=True):
    """Which of the loaded models."""

    name: str


class ModelRoutes:
    """Endpoints of the operator. They answer when the work is done; a client that leaves does not stop it."""

    def __init__(
        self, fleet: Fleet, access: Access, resolve: Callable[[ServedModel], Resolved], max_body_bytes: int
    ) -> None:
        """``resolve`` finds a model and checks that it may be served; it is called in a thread."""
        self._fleet = fleet
        self._access = access
        self._resolve = resolve
        self._max_body_bytes = max_body_bytes

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            self._access.check_admin(scope)
            body = await read_json_body(scope, receive, self._max_body_bytes)
            result = await {LOAD: self._load, RELOAD: self._reload, UNLOAD: self._unload}[scope["path"]](body)
            await send_bytes(send, 200, msgspec.json.encode(result))
        except ClientGone:
            scope["state"]["client_gone"] = True
        except HttpError as error:
            await send_error(send, error)
        except HearthError as error:
            await send_error(send, _told(error))
        except Exception as error:
            log.exception("request failed", extra=logs.fields(route=scope["path"]))
            await send_error(send, to_http_error(error))

    async def _load(self, body: bytes) -> dict[str, Any]:
        resolved = await self._find(_entry(body))
        return _facts(await self._fleet.load(resolved))

    async def _reload(self, body: bytes) -> dict[str, Any]:
        """Resolve the reference again: an alias may have moved, files of a directory may have changed."""
        name = self._fleet.main_name(decode(body, Named).name)
        known = self._fleet.to_reload(name)
        resolved = await self._find(known.entry)
        return _facts(await self._fleet.load(resolved, keep_adapters=True))

    async def _unload(self, body: bytes) -> dict[str, Any]:
        return {"name": await self._fleet.unload(decode(body, Named).name), "state": "unloaded"}

    async def _find(self, entry: ServedModel) -> Resolved:
        """Resolve in a thread that nobody waits for at the end: hashing or downloading may take long."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Resolved] = loop.create_future()

        def settle(result: Resolved | None, error: Exception | None) -> None:
            if not found.done():
                found.set_exception(error) if error is not None else found.set_result(result)  # type: ignore[arg-type]

        def work() -> None:
            result, error = None, None
            try:
                result = self._resolve(entry)
            except Exception as problem:  # noqa: BLE001 - raised again in the loop
                error = problem
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        threading.Thread(target=work, name="resolve", daemon=True).start()
        waiting: set[asyncio.Future[Any]] = {found, self._fleet.closing}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            found.cancel()
            raise shutting_down()
        return found.result()


def _entry(body: bytes) -> ServedModel:
    """The body as one entry of `models` in a server's settings; HttpError 400."""
    value = _decode_object(body)
    try:
        return ServedModel.model_validate(value)
    except ValidationError as error:
        problems = describe(ServedModel, error, value, lambda _key: None)
        places = {str(each["loc"][0]) for each in error.errors() if each["loc"]}
        param = places.pop() if len(places) == 1 else None
        raise HttpError(400, "; ".join(problems), param=param, code="invalid_value") from None


def _decode_object(body: bytes) -> dict[str, Any]:
    """A JSON object; HttpError 400 for anything else."""
    try:
        value = msgspec.json.decode(body)
    except NOT_JSON as error:
        raise not_json(error) from None
    if not isinstance(value, dict):
        raise HttpError(400, "the body: send a JSON object", code="invalid_value")
    return value


def _told(error: HearthError) -> HttpError:
    """With its fix: the operator is who can apply it."""
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)
    text = f"{error.message} ({error.fix})" if error.fix else error.message
    code = {404: "model_not_found"}.get(
        status, "gate_closed" if isinstance(error, GateError) else "load_failed"
    )
    return HttpError(status, text, code=code)


def _facts(worker: Worker) -> dict[str, Any]:
    return {
        "name": worker.spec.name,
        "version": worker.spec.version,
        "aliases": list(worker.spec.names[1:]),
        "state": worker.state,
        "max_model_len": worker.facts.get("max_model_len"),
        "adapters": list(worker.adapters),
    }
