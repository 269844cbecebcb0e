"""What worker and gateway share of HTTP: OpenAI-shaped errors, bounded bodies, the envelope of a request.

Errors look like OpenAI's, so that its official client raises the matching exception:
``{"error": {"message": …, "type": …, "param": …, "code": …}}``. In a stream that has started, the same object
is sent as one last event and the connection ends without ``[DONE]``.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hearth.errors import (
    EngineDeadError,
    EngineError,
    GateError,
    HearthError,
    InputError,
    NotFoundError,
    RequestError,
)
from hearth.telemetry import logs

REQUEST_ID_HEADER = "x-request-id"
MODEL_HEADER = "x-hearth-model"
CLIENT_CLOSED = 499  # logged and counted, never sent: the client is gone
JSON_TYPE = "application/json"
SSE_TYPE = "text/event-stream; charset=utf-8"
SSE_DONE = b"data: [DONE]\n\n"
BODY_SECONDS = 60.0  # for a whole body to arrive; a client that drips one byte by byte holds nothing for long

_HEADER_SAFE = " !#$&'()*+,/:;=?@[]"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TYPES = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class HttpError(Exception):
    """An answer that is an error; rendered in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> bytes:
        """The JSON body."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "server_error"),
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})

    def event(self) -> bytes:
        """The same as one event of a stream."""
        return b"data: " + self.body() + b"\n\n"

    def headers(self) -> dict[str, str]:
        """Extra headers of the response."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        if self.status == 408:
            return {"connection": "close"}  # what else the client sends is not read
        if self.retry_after is not None:
            return {"retry-after": str(max(1, round(self.retry_after)))}
        return {}


def to_http_error(error: BaseException) -> HttpError:
    """Map any exception to what the client is told; what we did not raise on purpose stays private."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, RequestError):
        text = f"{error.message} ({error.fix})" if error.fix else error.message
        return HttpError(400, text, param=error.param, code=getattr(error, "code", None))
    if isinstance(error, NotFoundError):
        return HttpError(404, error.message, code="not_found")
    if isinstance(error, (InputError, GateError)):
        return HttpError(400, str(error.message))
    if isinstance(error, EngineDeadError):
        return HttpError(503, "the engine stopped; it is being restarted", code="engine_dead", retry_after=5)
    if isinstance(error, EngineError):
        return HttpError(500, f"the engine failed: {error.message}", code="engine_error")
    if isinstance(error, HearthError):
        return HttpError(500, error.message, code="internal_error")
    return HttpError(500, "internal error; the server's log has the details", code="internal_error")


async def read_json_body(
    scope: Scope, receive: Receive, limit: int, *, seconds: float = BODY_SECONDS
) -> bytes:
    """The request body, at most ``limit`` bytes, of content type JSON.

    Raises HttpError 400 (type, empty), 413 or 408 (not whole after ``seconds``), and ClientGone when the
    client leaves midway.
    """
    headers = dict(scope["headers"])
    content_type = headers.get(b"content-type", b"").decode("latin-1").split(";")[0].strip().lower()
    if content_type != JSON_TYPE:
        given = f"content-type {content_type!r}" if content_type else "no content-type"
        raise HttpError(
            400, f"{given}: send JSON with content-type: {JSON_TYPE}", code="unsupported_media_type"
        )
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(seconds):
            return await _read_body(receive, limit)
    except TimeoutError:
        raise HttpError(408, f"the body was not whole after {seconds:g} s", code="request_timeout") from None


async def _read_body(receive: Receive, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            break
    if not size:
        raise HttpError(400, "the body is empty: send a JSON object", code="invalid_json")
    return b"".join(chunks)


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than {limit} bytes", code="request_too_large")


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


async def client_left(receive: Receive) -> None:
    """Return when the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_bytes(
    send: Send,
    status: int,
    body: bytes,
    *,
    content_type: str = JSON_TYPE,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send a whole response."""
    raw = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
    raw += [(key.encode(), value.encode("latin-1")) for key, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: HttpError) -> None:
    """Send ``error`` as a whole response."""
    await send_bytes(send, error.status, error.body(), headers=error.headers())


async def start_stream(send: Send, content_type: str = SSE_TYPE) -> None:
    """Start a streamed response that no proxy should buffer."""
    headers = [
        (b"content-type", content_type.encode()),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def json_response(data: Any, status: int = 200) -> Response:
    """A JSON response of a Starlette endpoint."""
    return Response(msgspec.json.encode(data), status, media_type=JSON_TYPE)


async def handle_http_error(request: Request, error: Exception) -> Response:
    """Starlette exception handler: our errors and Starlette's 404 and 405 in OpenAI's shape."""
    status = getattr(error, "status_code", None)  # starlette.exceptions.HTTPException
    if status == 404:
        error = HttpError(404, f"no such path: {request.method} {request.url.path}", code="not_found")
    elif status == 405:
        error = HttpError(
            405, f"{request.url.path} does not take {request.method}", code="method_not_allowed"
        )
    mapped = to_http_error(error)
    return Response(mapped.body(), mapped.status, headers=mapped.headers(), media_type=JSON_TYPE)


Done = Callable[[Scope, int, float], None]


class Envelope:
    """Around every request: its id, the two headers of every response, and one call at its end.

    The id comes from the client's ``x-request-id`` if it is short and plain, else it is made here.
    ``on_done(scope, status, seconds)`` gets 499 when the client left before an answer started.
    """

    def __init__(self, app: ASGIApp, on_done: Done) -> None:
        self._app = app
        self._on_done = on_done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID_HEADER.encode(), b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        facts = scope.setdefault("state", {})
        facts["request_id"] = request_id
        started, status = time.monotonic(), CLIENT_CLOSED

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name.lower() for name, _ in message["headers"]}
                extra = {REQUEST_ID_HEADER: request_id, MODEL_HEADER: facts.get("model_version")}
                message["headers"] = list(message["headers"]) + [
                    # A model may be called in any script; a header holds ASCII.
                    (name.encode(), quote(value, safe=_HEADER_SAFE).encode())
                    for name, value in extra.items()
                    if value and name.encode() not in names
                ]
            await send(message)

        with logs.request_context(request_id):
            try:
                await self._app(scope, receive, send_with_headers)
            except ClientGone:
                pass
            finally:
                if facts.get("client_gone"):
                    status = CLIENT_CLOSED
                self._on_done(scope, status, time.monotonic() - started)


async def race(work: Awaitable[None], receive: Receive) -> None:
    """Run ``work`` until it ends or the client leaves; in the second case cancel it and raise ClientGone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(client_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
