"""The worker's HTTP server around an engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hearth.engine import EngineStats
from hearth.errors import EngineDeadError
from hearth.serving.http import (
    ClientGone,
    Envelope,
    HttpError,
    handle_http_error,
    json_response,
    race,
    read_json_body,
    send_bytes,
    send_error,
    to_http_error,
)
from hearth.serving.worker.adapters import AdapterEngine, Adapters
from hearth.serving.worker.embedding import Embedder, EmbeddingEngine
from hearth.serving.worker.generation import Generates, Generation
from hearth.serving.worker.jobs import Job, JobMaker, ServedModel
from hearth.serving.worker.prompts import PromptMaker
from hearth.serving.worker.tokenization import Tokenization
from hearth.serving.worker.tokens import TokenTable
from hearth.telemetry import logs
from hearth.telemetry.metrics import CONTENT_TYPE, EngineMetrics, EngineSnapshot

log = logs.get_logger("worker")
STATS_TIMEOUT = 2.0  # seconds; a scrape must not wait for a busy engine


class WorkerEngine(Generates, AdapterEngine, EmbeddingEngine, Protocol):
    """What the worker uses of AsyncEngine."""

    tokenizer: Any
    model_info: dict[str, Any]

    @property
    def pid(self) -> int: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def heartbeat_age(self) -> float: ...
    async def stats(self) -> EngineStats: ...


class WorkerApp:
    """State and endpoints of one worker. ``asgi`` is the application."""

    def __init__(
        self,
        engine: WorkerEngine,
        model: ServedModel,
        *,
        max_body_bytes: int,
        engine_hang_seconds: float,
        adapters: dict[str, str] | None = None,
    ) -> None:
        """``adapters`` are loaded already: paths by name."""
        self.engine = engine
        self.model = model
        self.metrics = EngineMetrics(model.name, model.version, engine.model_info)
        self.adapters = Adapters(engine, model.names, adapters or {})
        prompts = PromptMaker(engine.tokenizer, model.version)
        tokenization = Tokenization(prompts, self.adapters, model.max_model_len)
        embedder = Embedder(engine, prompts, self.adapters, self.metrics, model.version, model.max_model_len)
        self._tokens = TokenTable(engine.tokenizer)
        self._max_body_bytes = max_body_bytes
        self._engine_hang_seconds = engine_hang_seconds
        self._started = time.time()
        self._last_stats: EngineStats | None = None
        make = JobMaker(model, prompts, self.adapters)
        routes = [
            Route("/v1/completions", self._generation(make.completion), methods=["POST"]),
            Route("/v1/chat/completions", self._generation(make.chat), methods=["POST"]),
            Route("/generate", self._generation(make.generate), methods=["POST"]),
            Route("/chat", self._generation(make.plain_chat), methods=["POST"]),
            Route("/v1/embeddings", self._reply(embedder.answer), methods=["POST"]),
            Route("/tokenize", self._reply(tokenization.tokenize), methods=["POST"]),
            Route("/detokenize", self._reply(tokenization.detokenize), methods=["POST"]),
            Route("/v1/load_lora_adapter", self._reply(self.adapters.load), methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._reply(self.adapters.unload), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/stats", self._stats),
            Route("/health", self._health),
            Route("/livez", self._livez),
            Route("/readyz", self._health),
            Route("/metrics", self._metrics),
        ]
        handlers = {HTTPException: handle_http_error, HttpError: handle_http_error}
        self.asgi: ASGIApp = Envelope(Starlette(routes=routes, exception_handlers=handlers), self._on_done)

    def _generation(self, make: Callable[[bytes], Awaitable[Job]]) -> ASGIApp:
        async def respond(body: bytes, scope: Scope, send: Send) -> None:
            job = await make(body)
            scope["state"]["model_version"] = job.version
            generation = Generation(self.engine, job, self._tokens, self.metrics)
            scope["state"]["generation"] = generation
            await generation.respond(send)

        return _Endpoint(self, respond)

    def _reply(self, work: Callable[[bytes], Awaitable[dict[str, Any]]]) -> ASGIApp:
        async def respond(body: bytes, _: Scope, send: Send) -> None:
            await send_bytes(send, 200, msgspec.json.encode(await work(body)))

        return _Endpoint(self, respond)

    async def answer(self, respond: Respond, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request with a body, from its first byte to the answer's last."""
        scope["state"]["model_version"] = self.model.version
        started = False

        async def watched_send(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            body = await read_json_body(scope, receive, self._max_body_bytes)
            await race(respond(body, scope, watched_send), receive)
        except ClientGone:
            scope["state"]["client_gone"] = True
        except Exception as error:
            if started:
                raise
            mapped = to_http_error(_only(error))
            if mapped.status >= 500 and not isinstance(error, EngineDeadError):
                log.exception("request failed", extra=logs.fields(route=scope["path"]))
            await send_error(send, mapped)

    def health(self) -> dict[str, Any]:
        """``status`` is ``ok``, ``engine_dead`` or ``engine_stuck``."""
        age = self.engine.heartbeat_age
        if not self.engine.is_alive:
            status = "engine_dead"
        else:
            status = "engine_stuck" if age > self._engine_hang_seconds else "ok"
        return {"status": status, "model": self.model.version, "heartbeat_age_seconds": round(age, 3)}

    async def _engine_stats(self) -> EngineStats | None:
        """Fresh numbers, or the last ones from an engine that is busy or gone."""
        with contextlib.suppress(TimeoutError, EngineDeadError):
            self._last_stats = await asyncio.wait_for(self.engine.stats(), STATS_TIMEOUT)
        return self._last_stats

    async def _stats(self, _: Request) -> Response:
        stats = await self._engine_stats()
        return json_response(
            {
                **self.health(),
                "pid": os.getpid(),
                "engine_pid": self.engine.pid,
                "uptime_seconds": round(time.time() - self._started, 3),
                "engine": None if stats is None else msgspec.to_builtins(stats),
                "model_info": self.engine.model_info,
            }
        )

    async def _health(self, _: Request) -> Response:
        health = self.health()
        return json_response(health, 200 if health["status"] == "ok" else 503)

    async def _livez(self, _: Request) -> Response:
        return json_response({"status": "ok"})

    async def _metrics(self, _: Request) -> Response:
        stats = await self._engine_stats()
        if stats is not None:
            self.metrics.update(
                EngineSnapshot(
                    num_running=stats.num_running,
                    num_waiting=stats.num_waiting,
                    kv_usage=stats.kv_cache_usage,
                    kv_waste=stats.kv_cache_waste,
                    num_used_host_blocks=stats.num_used_host_blocks,
                    num_adapters=len(self.adapters.paths),
                    heartbeat_age=self.engine.heartbeat_age,
                    num_preemptions=stats.num_preemptions,
                    prefix_query_tokens=stats.prefix_query_tokens,
                    prefix_hit_tokens=stats.prefix_hit_tokens,
                    num_blocks_swapped_out=stats.num_blocks_swapped_out,
                    num_blocks_swapped_in=stats.num_blocks_swapped_in,
                    num_drafts=stats.num_drafts,
                    num_draft_tokens=stats.num_draft_tokens,
                    num_accepted_tokens=stats.num_accepted_tokens,
                    num_steps=stats.num_steps,
                    num_failed_steps=stats.num_failed_steps,
                )
            )
        return Response(self.metrics.render(), headers={"content-type": CONTENT_TYPE})

    def describe(self) -> dict[str, Any]:
        """The entry of ``/v1/models``."""
        return {
            "id": self.model.name,
            "object": "model",
            "created": int(self._started),
            "owned_by": "hearth",
            "root": self.model.version,
            "max_model_len": self.model.max_model_len,
        }

    def _describe_adapter(self, name: str) -> dict[str, Any]:
        return {**self.describe(), "id": name, "root": self.adapters.paths[name], "parent": self.model.name}

    async def _models(self, _: Request) -> Response:
        data = [self.describe(), *map(self._describe_adapter, self.adapters.paths)]
        return json_response({"object": "list", "data": data})

    async def _one_model(self, request: Request) -> Response:
        adapter = self.adapters.find(request.path_params["name"])
        return json_response(self.describe() if adapter is None else self._describe_adapter(adapter))

    def _on_done(self, scope: Scope, status: int, seconds: float) -> None:
        generation: Generation | None = scope["state"].get("generation")
        if generation is None and status < 400:
            return  # probes and scrapes are not worth a line
        usage = generation.usage() if generation is not None else None
        log.info(
            "answered",
            extra=logs.fields(
                route=scope["path"],
                status=status,
                seconds=round(seconds, 4),
                **({k: v for k, v in asdict(usage).items() if v} if usage else {}),
            ),
        )


Respond = Callable[[bytes, Scope, Send], Awaitable[None]]


class _Endpoint:
    """A route that wants the raw ASGI call; Starlette wraps functions, so this is a class."""

    def __init__(self, app: WorkerApp, respond: Respond) -> None:
        self._app = app
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app.answer(self._respond, scope, receive, send)


def _only(error: Exception) -> BaseException:
    """The first of several errors that a group of tasks raised."""
    return error.exceptions[0] if isinstance(error, ExceptionGroup) else error
