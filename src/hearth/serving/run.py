"""The process of `hearth serve`: bind, resolve, start gateway and workers, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prometheus_client

from hearth.config import ServeConfig, ServedModel
from hearth.errors import ConfigError, Interrupted
from hearth.serving.gateway.access import Access
from hearth.serving.gateway.app import Gateway
from hearth.serving.gateway.fleet import Fleet, Limits
from hearth.serving.gateway.memory import claim
from hearth.serving.gateway.policy import RestartPolicy
from hearth.serving.gateway.supervisor import WorkerSpec
from hearth.serving.resolve import Resolved, resolve_models
from hearth.serving.servers import Server, bind, make_server
from hearth.telemetry import logs
from hearth.workspace import Workspace

log = logs.get_logger("serve")


@dataclass(frozen=True)
class Ready:
    """What there is to know once the server answers. ``timeline``: (what, seconds) in order."""

    url: str
    models: tuple[dict[str, Any], ...]
    timeline: tuple[tuple[str, float], ...]
    keys_required: bool


def serve(config: ServeConfig, *, on_ready: Callable[[Ready], None], note: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain. Returns after a clean end.

    Raises ConfigError (port in use, no keys to check against …), what resolving and loading the models
    raise, and Interrupted when it is stopped before it was ready or while requests were still open.
    """
    started = time.monotonic()
    sock = _bind(config)
    try:
        with contextlib.ExitStack() as stack:
            access = _access(config, stack)
            models = resolve_models(config.models, allow_ungated=config.allow_ungated, note=note)
            folder = Path(tempfile.mkdtemp(prefix="hearth-"))  # short: a socket's path has 107 bytes at most
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            if access.required is False and not _is_loopback(config.host):
                note(f"WARNING: {config.host} is reachable from outside and no API keys are required")
            session = _Session(config, models, access, sock, folder, note)
            asyncio.run(session.run(on_ready, [("resolve", time.monotonic() - started)]))
    finally:
        sock.close()


def _bind(config: ServeConfig) -> socket.socket:
    where = f"{config.host}:{config.port}"
    try:
        return bind(config.host, config.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {config.port} on {config.host} is in use",
                fix="choose another with --port, or --port 0 for a free one",
            ) from None
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from None


def _access(config: ServeConfig, stack: contextlib.ExitStack) -> Access:
    static = [key.get_secret_value() for key in config.api_keys]
    admin = None if config.admin_key is None else config.admin_key.get_secret_value().strip()
    loopback = _is_loopback(config.host)
    if not config.require_api_keys:
        return Access(static, admin_key=admin, loopback=loopback)
    keys = stack.enter_context(Workspace.open()).keys
    if not static and not any(key.active for key in keys.list()):
        raise ConfigError(
            "require_api_keys is set and the workspace has no active key: nobody could use the server",
            fix="create one with `hearth keys create NAME`",
        )
    return Access(static, lambda secret: keys.verify(secret) is not None, admin_key=admin, loopback=loopback)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


class _Session:
    """One run of the server."""

    def __init__(
        self,
        config: ServeConfig,
        models: Sequence[Resolved],
        access: Access,
        sock: socket.socket,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        self._config = config
        self._models = models
        self._access = access
        self._sock = sock
        self._folder = folder
        self._note = note
        self._num_signals = 0
        self._num_cut = 0  # requests that were open when they were ended by force

    async def run(self, on_ready: Callable[[Ready], None], timeline: list[tuple[str, float]]) -> None:
        """Serve until a signal."""
        config = self._config
        gateway = Gateway(
            access=self._access,
            max_queue=config.max_queue,
            max_body_bytes=config.max_body_bytes,
            request_timeout=config.request_timeout,
            cors_origins=config.cors_origins,
        )
        limits = Limits(config.max_models, config.drain_timeout)
        fleet = Fleet(gateway, self._folder, lambda model: _spec(model, config), limits, claim)
        gateway.attach(fleet, self._resolve)
        for model in self._models:
            fleet.begin(model)
        # The gateway aborts what is left after drain_timeout; uvicorn's own limit is only a backstop.
        server = make_server(gateway.asgi, drain_seconds=config.drain_timeout + 5)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, stop, gateway)
        serving = asyncio.create_task(server.serve([self._sock]))
        stopping = asyncio.create_task(stop.wait())
        try:
            if not await self._until_ready(gateway, serving, stopping):
                raise Interrupted("stopped before the server was ready")
            fleet.is_open = True
            on_ready(self._ready(gateway, timeline))
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            fleet.give_up_loads()
            await self._drain(gateway, server, serving)
        finally:
            server.should_exit = server.force_exit = True
            await fleet.close()
            for task in (stopping, serving):
                task.cancel()
            await asyncio.gather(stopping, serving, return_exceptions=True)

    def _resolve(self, entry: ServedModel) -> Resolved:
        return resolve_models([entry], allow_ungated=self._config.allow_ungated, note=self._note)[0]

    def _on_signal(self, stop: asyncio.Event, gateway: Gateway) -> None:
        self._num_signals += 1
        gateway.draining = True
        stop.set()
        if self._num_signals > 1:  # whoever asks twice does not want to wait
            self._num_cut = self._num_cut or gateway.num_open
            gateway.abort_all()

    async def _until_ready(
        self, gateway: Gateway, serving: asyncio.Task[None], stopping: asyncio.Task[bool]
    ) -> bool:
        """Wait for the first start of all workers; raises the first one's error. False: a signal came."""
        starting = asyncio.gather(*(worker.first_start for worker in gateway.workers))
        waiting: set[asyncio.Future[Any]] = {starting, serving, stopping}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                return True
            if serving.done():
                serving.result()
            return False
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

    def _ready(self, gateway: Gateway, timeline: list[tuple[str, float]]) -> Ready:
        for worker in gateway.workers:
            prefix = f"{worker.spec.name}: " if len(gateway.workers) > 1 else ""
            timeline += [(prefix + name, seconds) for name, seconds in worker.facts["timeline"].items()]
        host, port = self._sock.getsockname()[:2]
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        models = tuple(
            {
                "name": worker.spec.name,
                "version": worker.spec.version,
                "aliases": list(worker.spec.aliases),
                "max_model_len": worker.facts.get("max_model_len"),
                "pid": worker.pid,
                "chat": bool(worker.facts.get("chat")),
                "tool_parser": worker.facts.get("model_info", {}).get("tool_parser"),
                "reasoning_parser": worker.facts.get("model_info", {}).get("reasoning_parser"),
                "adapters": list(worker.adapters),
            }
            for worker in gateway.workers
        )
        return Ready(f"http://{shown}:{port}", models, tuple(timeline), self._access.required)

    async def _drain(self, gateway: Gateway, server: Server, serving: asyncio.Task[None]) -> None:
        """Let open requests finish, for ``drain_timeout``; then end them with an error."""
        server.should_exit = True
        log.info("draining", extra=logs.fields(open=gateway.num_open, seconds=self._config.drain_timeout))
        await asyncio.wait({serving}, timeout=self._config.drain_timeout)
        num_open = self._num_cut or gateway.num_open
        gateway.abort_all()
        await asyncio.wait({serving}, timeout=2.0)
        if num_open:
            raise Interrupted(f"stopped while {num_open} requests were open")


_NOT_OF_THE_ENGINE = ("adapters", "tool_parser", "reasoning_parser")


def _engine_fields(entry: ServedModel) -> dict[str, Any]:
    """What EngineConfig is told; what was not given is the engine's own default."""
    return entry.model_dump(exclude={"model", "name", *_NOT_OF_THE_ENGINE}, exclude_none=True)


def _spec(model: Resolved, config: ServeConfig) -> WorkerSpec:
    style = config.log_format
    if style == "auto":
        style = "plain" if os.isatty(2) else "json"
    return WorkerSpec(
        name=model.name,
        version=model.version,
        aliases=model.aliases,
        path=model.path,
        arguments=(
            *("--engine", json.dumps(_engine_fields(model.entry))),
            *("--tool-parser", model.entry.tool_parser),
            *("--reasoning-parser", model.entry.reasoning_parser),
            *("--max-body-bytes", str(config.max_body_bytes)),
            *("--engine-hang-seconds", str(config.engine_hang_timeout)),
            *("--log-format", style, "--log-level", config.log_level),
        ),
        adapters=tuple(f"{name}={path}" for name, path in model.entry.adapters.items()),
        start_timeout=config.startup_timeout,
        health_interval=config.health_interval,
        health_timeout=config.health_timeout,
        idle_seconds=config.idle_unload_seconds,
        policy=RestartPolicy(backoff=config.restart_backoff, limit=config.restart_limit),
    )
