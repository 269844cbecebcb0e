"""Forward a request to its worker and the answer's bytes back; turn every failure into an error at once.

Before the first byte a failure is a JSON error with a status of its own. After it, in a stream, it is one
last event with the error, and the connection ends without ``[DONE]``: no client takes a half for a whole.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from starlette.types import Receive, Scope, Send

from hearth.serving.gateway.supervisor import Worker
from hearth.serving.http import (
    JSON_TYPE,
    MODEL_HEADER,
    REQUEST_ID_HEADER,
    SSE_DONE,
    ClientGone,
    HttpError,
    client_left,
    send_bytes,
)
from hearth.telemetry import logs
from hearth.telemetry.metrics import GatewayMetrics

log = logs.get_logger("gateway")
_RETRY_SECONDS = 5.0
_FORWARDED = ("content-type", "cache-control", "x-accel-buffering", "retry-after")


class Proxy:
    """Forwards requests to workers."""

    def __init__(self, metrics: GatewayMetrics, *, request_timeout: float) -> None:
        self._metrics = metrics
        self._request_timeout = request_timeout

    async def forward(self, worker: Worker, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises HttpError before the first byte, ClientGone when the client left."""
        exchange = _Exchange(send)
        work = asyncio.ensure_future(self._exchange(exchange, worker, body, scope))
        left = asyncio.ensure_future(client_left(receive))
        try:
            # worker.cut is of all its requests: never cancelled here.
            waiting: set[asyncio.Future[Any]] = {work, left, worker.cut}
            await asyncio.wait(waiting, timeout=self._request_timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif left.done():
                raise ClientGone
            elif worker.cut.done():
                message, code = worker.cut.result()
                raise HttpError(503, message, code=code, retry_after=_RETRY_SECONDS)
            else:
                self._metrics.upstream_errors.labels(worker.spec.name, "timeout").inc()
                raise HttpError(
                    504, f"the answer took longer than {self._request_timeout:g} s", code="request_timeout"
                )
        except HttpError as error:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            if not exchange.started:
                raise
            log.warning(
                "stream ended with an error", extra=logs.fields(model=worker.spec.version, code=error.code)
            )
            scope["state"]["outcome"] = error.status
            await exchange.fail(error)
        finally:
            # Cancelling closes the connection to the worker, which aborts the request in its engine.
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    async def _exchange(self, exchange: _Exchange, worker: Worker, body: bytes, scope: Scope) -> None:
        session = worker.session
        if session is None or worker.state != "ready":
            raise unavailable(worker)
        headers = {"content-type": JSON_TYPE, REQUEST_ID_HEADER: scope["state"]["request_id"]}
        try:
            async with session.post(scope["path"], data=body, headers=headers) as response:
                await exchange.copy(response)
                if not exchange.whole or response.status >= 500:
                    worker.doubt()
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            worker.doubt()
            self._metrics.upstream_errors.labels(worker.spec.name, "connection").inc()
            log.warning(
                "worker failed", extra=logs.fields(model=worker.spec.version, error=type(error).__name__)
            )
            then = "it was being unloaded" if worker.retired else "it is being restarted"
            raise HttpError(
                503,
                f"the worker of {worker.spec.version} failed while it answered; {then}",
                code="worker_failed",
                retry_after=_RETRY_SECONDS,
            ) from error


class _Exchange:
    """The response on its way to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._tail = b""
        self._streaming = False
        self.started = False

    @property
    def whole(self) -> bool:
        """Whether a stream has come to its regular end; what is no stream always has."""
        return not self._streaming or self._tail == SSE_DONE

    async def copy(self, response: aiohttp.ClientResponse) -> None:
        """Copy status, the headers that matter, and the body: a stream as it comes, else in one piece."""
        headers = {name: response.headers[name] for name in _FORWARDED if name in response.headers}
        if MODEL_HEADER in response.headers:
            headers[MODEL_HEADER] = response.headers[MODEL_HEADER]
        content_type = headers.pop("content-type", JSON_TYPE)
        if not content_type.startswith("text/event-stream"):
            # Whole before it is passed on: a worker that dies midway still leaves us a status to choose.
            body = await response.read()
            self.started = True
            await send_bytes(self._send, response.status, body, content_type=content_type, headers=headers)
            return
        self.started = self._streaming = True
        raw = [(b"content-type", content_type.encode())]
        raw += [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": response.status, "headers": raw})
        async for chunk in response.content.iter_any():
            self._tail = (self._tail + chunk)[-len(SSE_DONE) :]
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: HttpError) -> None:
        """End a response that has started."""
        assert self.started
        if not self._streaming:
            return
        if self.whole:  # only its last empty chunk was lost
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        # The bytes so far may end inside an event; an empty line ends it, so that ours stands alone.
        gap = b"" if self._tail.endswith(b"\n\n") or not self._tail else b"\n\n"
        await self._send({"type": "http.response.body", "body": gap + error.event(), "more_body": False})


def unavailable(worker: Worker) -> HttpError:
    """Why ``worker`` cannot take a request now."""
    version = worker.spec.version
    if worker.state == "failed":
        return HttpError(
            503,
            f"{version} keeps failing and was given up; its operator must restart it",
            code="model_failed",
        )
    what = "is starting" if worker.state in ("starting", "asleep") else "is being restarted"
    return HttpError(503, f"{version} {what}", code="model_not_ready", retry_after=_RETRY_SECONDS)
