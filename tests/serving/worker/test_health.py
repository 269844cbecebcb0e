"""A worker over a real engine: what /health and /readyz say when the engine is stopped, goes on, and dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hearth.engine import AsyncEngine
from hearth.serving.worker.app import WorkerApp
from hearth.serving.worker.jobs import ServedModel

MODEL = "tiny-base"


async def call(
    app: Any, path: str, body: dict | None = None, *, leave_after: float | None = None
) -> tuple[int, Any]:
    """Status and JSON of one request; ``leave_after`` so many seconds the client closes the connection."""
    sent: list[dict[str, Any]] = []
    data, told = b"" if body is None else json.dumps(body).encode(), False

    async def receive() -> dict[str, Any]:
        nonlocal told
        if told:
            await asyncio.sleep(3600 if leave_after is None else leave_after)
            return {"type": "http.disconnect"}
        told = True
        return {"type": "http.request", "body": data}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "GET" if body is None else "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json")],
        "state": {}, "scheme": "http", "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    if not sent:
        return 0, None
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_health_is_that_of_the_engine(tiny_base: Path) -> None:
    engine = await AsyncEngine.start(tiny_base, num_threads=1, max_num_seqs=4)
    try:
        model = ServedModel(MODEL, MODEL, (MODEL,), tiny_base, engine.max_model_len)
        app = WorkerApp(engine, model, max_body_bytes=10_000, engine_hang_seconds=3.0).asgi

        async def statuses() -> set[tuple[int, str]]:
            pages = [await call(app, path) for path in ("/health", "/readyz")]
            return {(status, page["status"]) for status, page in pages}

        async def is_ok() -> bool:
            return await statuses() == {(200, "ok")}

        await until(is_ok)
        # A client that leaves takes its request along, though nothing was streamed to it.
        endless = {"prompt": "x", "max_tokens": 250, "n": 4, "ignore_eos": True}
        assert await call(app, "/v1/completions", endless, leave_after=0.2) == (0, None)

        async def is_idle() -> bool:
            return (await engine.stats()).num_running == 0

        await until(is_idle)
        assert (await engine.stats()).finished.get("abort", 0) == 4
        # Stopped in the middle of its work.
        work = asyncio.create_task(call(app, "/v1/completions", endless))
        await asyncio.sleep(0.2)
        os.kill(engine.pid, signal.SIGSTOP)

        async def is_stuck() -> bool:
            return await statuses() == {(503, "engine_stuck")}

        await until(is_stuck)
        assert (await call(app, "/livez"))[0] == 200  # the worker itself is well
        os.kill(engine.pid, signal.SIGCONT)
        await until(is_ok)
        assert (await work)[0] == 200
        work = asyncio.create_task(call(app, "/v1/completions", endless))
        await asyncio.sleep(0.1)
        os.kill(engine.pid, signal.SIGKILL)
        status, answer = await asyncio.wait_for(work, 20)
        assert (status, answer["error"]["code"]) == (503, "engine_dead")
        assert await statuses() == {(503, "engine_dead")}
        assert (await call(app, "/v1/completions", endless))[0] == 503
    finally:
        await engine.close()
