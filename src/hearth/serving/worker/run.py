"""The worker's process: arguments, the engine's start, the server, the end.

Standard output carries one JSON object a line for a supervisor: ``{"event": "ready", …}`` or
``{"event": "failed", "message", "fix", "exit_code"}``. Logs go to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.errors import HearthError
from hearth.telemetry import logs
from hearth.workspace.lifeline import die_with_parent, event_channel

if TYPE_CHECKING:
    from hearth.engine import AsyncEngine
    from hearth.engine.parsing import Style
    from hearth.serving.servers import Server

log = logs.get_logger("worker")
EXIT_ENGINE_DEAD = 70
_FLUSH_SECONDS = 0.5  # for the errors of open requests to leave, once the engine is dead


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The worker's command line."""
    parser = argparse.ArgumentParser(prog="python -m hearth.serving.worker", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face model directory")
    parser.add_argument("--name", help="the name that requests use; default: the directory's name")
    parser.add_argument("--served-version", help="what answers are attributed to, such as name@3")
    parser.add_argument("--alias", action="append", default=[], help="another name that requests may use")
    parser.add_argument("--uds", help="serve on this Unix socket")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--engine", type=json.loads, default={}, help="EngineConfig fields as JSON")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=PATH", help="a LoRA adapter to load"
    )
    parser.add_argument("--tool-parser", default="auto", help="format of tool calls: auto, none or a name")
    parser.add_argument("--reasoning-parser", default="auto", help="format of reasoning: likewise")
    parser.add_argument("--max-body-bytes", type=int, default=16 * 2**20)
    parser.add_argument("--engine-hang-seconds", type=float, default=120.0)
    parser.add_argument("--drain-seconds", type=float, default=10.0)
    parser.add_argument("--log-format", default="auto", choices=("auto", "json", "plain"))
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--supervised", action="store_true", help="die when standard input ends")
    return parser.parse_args(arguments)


def run(arguments: list[str]) -> int:
    """Run to the end; returns the exit code."""
    started = time.monotonic()
    options = parse_arguments(arguments)
    channel = event_channel()
    if options.supervised:
        die_with_parent()
    name = options.name or options.model.resolve().name
    logs.configure(options.log_format, level=options.log_level, static={"process": "worker", "model": name})
    try:
        return asyncio.run(_serve(options, name, channel, started))
    except HearthError as error:
        _emit(
            channel,
            {
                "event": "failed",
                "kind": type(error).__name__,
                "message": error.message,
                "fix": error.fix,
                "exit_code": error.exit_code,
            },
        )
        if not options.supervised:  # a supervisor tells the event to whoever it is for
            log.error("cannot start", extra=logs.fields(reason=error.message))
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def model_names(options: argparse.Namespace, name: str) -> tuple[str, ...]:
    """All names that mean the model, the main one first."""
    return tuple(dict.fromkeys([name, options.served_version or name, *options.alias]))


def _emit(channel: int, event: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody listens
        os.write(channel, json.dumps(event).encode() + b"\n")


async def _serve(options: argparse.Namespace, name: str, channel: int, started: float) -> int:
    from hearth.engine import AsyncEngine, EngineConfig
    from hearth.serving.worker.starting import load_adapters, style_of

    imported = time.monotonic()
    config = EngineConfig.of(**options.engine)
    engine = await AsyncEngine.start(options.model, config)
    try:
        adapters = await load_adapters(engine, options.adapter, model_names(options, name))
        loaded = time.monotonic()
        style = style_of(engine.tokenizer, options.tool_parser, options.reasoning_parser)
        engine.model_info |= {"tool_parser": style.tools, "reasoning_parser": style.reasoning}
        server = _make_server(options, name, engine, style, adapters)
        loading = engine.initial_stats.load_seconds
        timeline = {
            "imports": imported - started,
            "engine process": loaded - imported - loading,
            "model": loading,
        }
        ready = {
            "event": "ready",
            "pid": os.getpid(),
            "engine_pid": engine.pid,
            "max_model_len": engine.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "chat": bool(getattr(engine.tokenizer, "chat_template", None)),
            "model_info": engine.model_info,
            "adapters": adapters,
        }

        def on_started() -> None:
            timeline["server"] = time.monotonic() - loaded
            rounded = {key: round(value, 3) for key, value in timeline.items()}
            _emit(channel, {**ready, "timeline": rounded})
            log.info("ready", extra=logs.fields(seconds=round(time.monotonic() - started, 2)))

        return await _serve_until_end(server, engine, on_started)
    finally:
        await engine.close()
        sys.stderr.flush()


def _make_server(
    options: argparse.Namespace, name: str, engine: AsyncEngine, style: Style, adapters: dict[str, str]
) -> Server:
    # Imported now, not before the engine's start: these need what the engine's tokenizer has just loaded,
    # and loading it first would keep the engine's process waiting for its own imports.
    import prometheus_client

    from hearth.serving.servers import make_server
    from hearth.serving.worker.app import WorkerApp
    from hearth.serving.worker.jobs import ServedModel, generation_defaults

    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    version = options.served_version or name
    model = ServedModel(
        name=name,
        version=version,
        names=model_names(options, name),
        path=options.model,
        max_model_len=engine.max_model_len,
        defaults=generation_defaults(options.model),
        style=style,
    )
    app = WorkerApp(
        engine,
        model,
        max_body_bytes=options.max_body_bytes,
        engine_hang_seconds=options.engine_hang_seconds,
        adapters=adapters,
    )
    address = {"uds": options.uds} if options.uds else {"host": options.host, "port": options.port}
    return make_server(app.asgi, drain_seconds=options.drain_seconds, **address)


async def _serve_until_end(server: Server, engine: AsyncEngine, on_started: Callable[[], None]) -> int:
    """Serve until a signal (0) or until the engine dies (70), whose open requests still get their errors."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, setattr, server, "should_exit", True)
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if serving.done():
            serving.result()
            return 1
        on_started()
        while not serving.done() and engine.is_alive:
            await asyncio.wait({serving}, timeout=0.2)
        if serving.done():
            return 0
        log.error("engine died")
        await asyncio.sleep(_FLUSH_SECONDS)
        return EXIT_ENGINE_DEAD
    finally:
        server.should_exit = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(serving), 2 * _FLUSH_SECONDS)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
