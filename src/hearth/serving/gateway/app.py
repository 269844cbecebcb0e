"""The gateway's ASGI application: routes, keys, limits, and the state of all models."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hearth.config import ServedModel
from hearth.serving.gateway.access import Access
from hearth.serving.gateway.adapters import LOAD_PATH, UNLOAD_PATH, AdapterRoutes
from hearth.serving.gateway.fleet import Fleet
from hearth.serving.gateway.models import PATHS, ModelRoutes
from hearth.serving.gateway.pages import Pages
from hearth.serving.gateway.proxy import Proxy, unavailable
from hearth.serving.gateway.supervisor import Worker
from hearth.serving.http import (
    ClientGone,
    Envelope,
    HttpError,
    handle_http_error,
    read_json_body,
    send_error,
    to_http_error,
)
from hearth.serving.protocol import routing_fields
from hearth.serving.resolve import Resolved
from hearth.telemetry import logs
from hearth.telemetry.metrics import GatewayMetrics
from hearth.version import __version__

log = logs.get_logger("gateway")

ANSWERING = ("ready", "asleep")  # now, or after a moment that the request waits
# Without a key: what probes and scrapers of the operator's own network need. They show no text.
OPEN_PATHS = frozenset({"/livez", "/readyz", "/metrics"})
GENERATION_PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/generate", "/chat"),
    *("/v1/embeddings", "/tokenize", "/detokenize"),
)


class Gateway:
    """All models of one server. ``asgi`` is the application; ``workers`` are those that take requests."""

    def __init__(
        self,
        *,
        access: Access,
        max_queue: int,
        max_body_bytes: int,
        request_timeout: float,
        cors_origins: tuple[str, ...] = (),
    ) -> None:
        self.workers: list[Worker] = []
        self.metrics = GatewayMetrics(__version__)
        self.proxy = Proxy(self.metrics, request_timeout=request_timeout)
        self.fleet: Fleet | None = None  # if models may come and go
        self._request_timeout = request_timeout
        self._access = access
        self.draining = False
        self._max_queue = max_queue
        self.max_body_bytes = max_body_bytes
        self._by_name: dict[str, Worker] = {}
        self._num_open = 0
        routes = [Route(path, _RawRoute(self.answer), methods=["POST"]) for path in GENERATION_PATHS]
        adapters = AdapterRoutes(self, access)
        routes += [
            Route(path, _RawRoute(adapters.answer), methods=["POST"]) for path in (LOAD_PATH, UNLOAD_PATH)
        ]
        pages = Pages(self)
        routes += [
            Route("/v1/models", pages.openai_models),
            Route("/v1/models/{name:path}", pages.openai_model),
            Route("/models", pages.models),
            Route("/stats", pages.stats),
            Route("/health", pages.health),
            Route("/livez", pages.livez),
            Route("/readyz", pages.readyz),
            Route("/metrics", pages.metrics),
        ]
        handlers = {HTTPException: handle_http_error, HttpError: handle_http_error}
        self._inner = Starlette(routes=routes, exception_handlers=handlers)
        guarded: ASGIApp = _Guard(self._inner, access)
        if cors_origins:  # outside the guard: a browser's preflight request carries no key
            guarded = CORSMiddleware(
                guarded, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"]
            )
        self.asgi: ASGIApp = Envelope(guarded, self._on_done)

    def attach(self, fleet: Fleet, resolve: Callable[[ServedModel], Resolved]) -> None:
        """Let the operator load and unload models of ``fleet``."""
        self.fleet = fleet
        models = ModelRoutes(fleet, self._access, resolve, self.max_body_bytes)
        self._inner.router.routes.extend(
            Route(path, _RawRoute(models.answer), methods=["POST"]) for path in PATHS
        )

    def add(self, worker: Worker) -> None:
        """Serve ``worker`` under all its names."""
        self.replace(None, worker)

    def replace(self, old: Worker | None, new: Worker | None) -> None:
        """Send the requests for ``old`` to ``new``, which has the same name, from now on. None: no worker."""
        workers = [worker for worker in self.workers if worker is not old]
        if new is not None:
            workers.insert(len(workers) if old is None else self.workers.index(old), new)
            if old is None:
                self.metrics.register_model(new.spec.name)
            self.metrics.worker_up.labels(new.spec.name).set(int(new.state == "ready"))
        elif old is not None:
            self.metrics.worker_up.labels(old.spec.name).set(0)
        self.workers = workers
        self._by_name = {name: worker for worker in workers for name in worker.spec.names}

    def on_change(self, worker: Worker) -> None:
        """A worker changed its state."""
        if worker not in self.workers:
            return  # what still loads, or leaves, is not the model's worker
        name = worker.spec.name
        self.metrics.worker_up.labels(name).set(1 if worker.state == "ready" else 0)
        if worker.state == "waiting":
            self.metrics.restarts.labels(name).inc()

    @property
    def in_flight(self) -> dict[str, int]:
        """Sequences that are computed, by model."""
        return {worker.spec.name: worker.in_flight for worker in self.workers}

    def abort_all(self) -> None:
        """End every request that is still open with an error: the time for draining is over."""
        leaving = () if self.fleet is None else self.fleet.workers
        for worker in {*self.workers, *leaving}:
            worker.end_requests("the server is shutting down", "shutting_down")

    def route(self, model: str | None) -> Worker:
        """The worker that answers for ``model``; HttpError 404, or 400 when a name is needed."""
        if model is None:
            if len(self.workers) == 1:
                return self.workers[0]
            text = f"say which model: one of {self._known()}" if self.workers else "no model is loaded"
            raise HttpError(400, text, param="model", code="missing_required_parameter")
        worker = self._by_name.get(model) or self._of_adapter(model)
        if worker is None:
            shown = model if len(model) <= 100 else model[:100] + "…"
            raise HttpError(
                404, f"the model {shown!r} is not served here; there is {self._known() or 'none'}",
                param="model", code="model_not_found",
            )  # fmt: skip
        return worker

    def _of_adapter(self, model: str) -> Worker | None:
        """The worker of an adapter, called by its own name or as BASE:NAME."""
        for worker in self.workers:
            if model in worker.adapters:
                return worker
        base, _, name = model.rpartition(":")
        named = self._by_name.get(base)
        return named if named is not None and name in named.adapters else None

    def _known(self) -> str:
        return ", ".join(name for worker in self.workers for name in (worker.spec.name, *worker.adapters))

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one generation request."""
        state = scope["state"]
        state["route"] = scope["path"]
        try:
            body = await read_json_body(scope, receive, self.max_body_bytes)
            routing = routing_fields(body)
            state["stream"] = bool(routing.stream)
            worker = self.route(routing.model)
            state["model"], state["model_version"] = worker.spec.name, worker.spec.version
            with self._admit(worker, routing.num_sequences):
                if worker.wakes and not await worker.wake(self._request_timeout):
                    raise unavailable(worker)
                await self.proxy.forward(worker, body, scope, receive, send)
        except ClientGone:
            state["client_gone"] = True
        except HttpError as error:
            await send_error(send, error)
        except Exception as error:
            log.exception("request failed", extra=logs.fields(route=scope["path"]))
            await send_error(send, to_http_error(error))

    @contextlib.contextmanager
    def _admit(self, worker: Worker, num_sequences: int = 1) -> Iterator[None]:
        """Count a request's sequences while it is answered; HttpError 429 or 503 if it may not be.

        One that is larger than the limit is let in when nothing else is open: later it would fit no better.
        """
        name = worker.spec.name
        if self.draining:
            self.metrics.rejected.labels(name, "draining").inc()
            raise HttpError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if worker.state != "ready" and not worker.wakes:
            self.metrics.rejected.labels(name, "not_ready").inc()
            raise unavailable(worker)
        limit = int(worker.facts.get("max_num_seqs", 0)) + self._max_queue
        open_now = worker.in_flight
        if open_now >= limit or (open_now and open_now + num_sequences > limit):
            self.metrics.rejected.labels(name, "overloaded").inc()
            raise HttpError(
                429,
                f"{worker.spec.version} is computing {open_now} sequences and this request asks for "
                f"{num_sequences}; its limit is {limit}",
                code="rate_limit_exceeded", retry_after=1,
            )  # fmt: skip
        self._num_open += 1
        self.metrics.in_flight.labels(name).inc()
        try:
            with worker.busy(num_sequences):
                yield
        finally:
            self._num_open -= 1
            self.metrics.in_flight.labels(name).dec()

    @property
    def ready(self) -> bool:
        """A model can answer, and the server is not on its way out."""
        return not self.draining and any(worker.state in ANSWERING for worker in self.workers)

    @property
    def num_open(self) -> int:
        """Generation requests that are being answered."""
        return self._num_open

    def _on_done(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        route = state.get("route")
        if route is None:
            if status >= 400 and scope["path"] not in OPEN_PATHS:
                log.info("refused", extra=logs.fields(status=status))
            return
        status = state.get("outcome", status)
        self.metrics.observe_request(route, state.get("model", ""), status, seconds)
        log.info(
            "request",
            extra=logs.fields(
                route=route,
                model=state.get("model_version"),
                status=status,
                stream=state.get("stream"),
                seconds=round(seconds, 4),
            ),
        )


class _RawRoute:
    """A route that wants the raw ASGI call; Starlette wraps functions, so this is a class."""

    def __init__(self, answer: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


class _Guard:
    """Asks for a key before anything else is looked at."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            authorization = dict(scope["headers"]).get(b"authorization")
            try:
                await self._access.check(authorization.decode("latin-1") if authorization else None)
            except Exception as error:
                if not isinstance(error, HttpError):  # the database of the keys does not answer
                    log.exception("a key could not be checked")
                if scope["path"] in GENERATION_PATHS:
                    scope["state"]["route"] = scope["path"]
                await send_error(send, to_http_error(error))
                return
        await self._app(scope, receive, send)
