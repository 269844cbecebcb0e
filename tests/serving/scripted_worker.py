"""A real process with the worker's contract (events, Unix socket, HTTP) that fails in the ways it is told to.

The ``prompt`` of a request is the script: faults that the real worker shows only by accident, at will.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from hearth.serving.servers import make_server
from hearth.workspace.lifeline import die_with_parent, event_channel

cancelled: list[str] = []
engine = {"status": "ok"}


async def generate(request: Request) -> Response:
    script = (await request.json()).get("prompt", "answer")
    if script == "die":
        os._exit(9)
    if script == "sleep":
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        cancelled.append(script)
    if script == "engine-dies":
        engine["status"] = "engine_dead"
        return JSONResponse({"error": {"message": "no", "param": None, "code": "x", "type": "t"}}, 503)
    if script == "refuse":
        return JSONResponse({"error": {"message": "no", "param": "prompt", "code": "x", "type": "t"}}, 400)
    if script.startswith("stream"):
        return StreamingResponse(stream(script), media_type="text/event-stream")
    return JSONResponse({"text": script, "path": request.url.path, "id": request.headers["x-request-id"]})


async def stream(script: str):
    try:
        for number in range(3):
            yield b'data: {"choices": [{"index": 0, "text": "%d"}]}\n\n' % number
            await asyncio.sleep(0.01)
        if script == "stream-half":
            yield b'data: {"choices": [{"ind'
            await asyncio.sleep(0.2)
            os._exit(9)
        if script == "stream-die":
            await asyncio.sleep(0.2)
            os._exit(9)
        if script == "stream-engine-dies":
            engine["status"] = "engine_dead"
            yield b'data: {"error": {"message": "no"}}\n\n'
            return
        if script == "stream-sleep":
            await asyncio.sleep(60)
        yield b"data: [DONE]\n\n"
        if script == "stream-done-die":
            await asyncio.sleep(0.2)
            os._exit(9)
    except (asyncio.CancelledError, GeneratorExit):
        cancelled.append(script)
        raise


async def load_adapter(request: Request) -> Response:
    body = await request.json()
    if body["lora_path"] == "bad":
        return JSONResponse(
            {"error": {"message": "bad", "param": "lora_path", "code": "x", "type": "t"}}, 400
        )
    if body["lora_path"].startswith("wait:"):
        while not Path(body["lora_path"].removeprefix("wait:")).exists():
            await asyncio.sleep(0.01)
    return JSONResponse(body)


async def unload_adapter(request: Request) -> Response:
    return JSONResponse(await request.json())


async def health(request: Request) -> Response:
    return JSONResponse(engine)


async def stats(request: Request) -> Response:
    return JSONResponse({"cancelled": cancelled, "pid": os.getpid()})


async def metrics(request: Request) -> Response:
    return Response(b'# HELP scripted x\n# TYPE scripted gauge\nscripted{model="scripted"} 1\n')


async def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--uds", "--name", "--model", "--served-version"):
        parser.add_argument(name)
    parser.add_argument("--alias", action="append")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--supervised", action="store_true")
    parser.add_argument("--count-file", type=Path)
    parser.add_argument("--fail-from", type=int, default=10**9)
    parser.add_argument("--wait-for", type=Path)
    parser.add_argument("--fail-with")
    options = parser.parse_args()
    channel = event_channel()
    die_with_parent()
    while options.wait_for is not None and not options.wait_for.exists():
        await asyncio.sleep(0.01)
    if options.fail_with is not None:
        failed = {"event": "failed", "kind": "ModelError", "message": options.fail_with, "fix": "mend it"}
        os.write(channel, json.dumps(failed).encode() + b"\n")
        sys.exit(2)
    if options.count_file is not None:
        with options.count_file.open("a") as file:
            file.write("start\n")
        if len(options.count_file.read_text().splitlines()) > options.fail_from:
            sys.exit(3)
    paths = ("/v1/completions", "/v1/chat/completions", "/generate", "/chat", "/v1/embeddings", "/tokenize")
    routes = [Route(path, generate, methods=["POST"]) for path in paths]
    routes += [
        Route("/v1/load_lora_adapter", load_adapter, methods=["POST"]),
        Route("/v1/unload_lora_adapter", unload_adapter, methods=["POST"]),
    ]
    routes += [Route("/health", health), Route("/stats", stats), Route("/metrics", metrics)]
    server = make_server(Starlette(routes=routes), drain_seconds=1, uds=options.uds)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    print("a stray line of a library")  # noqa: T201 - must not disturb the event channel
    event = {"event": "ready", "timeline": {}, "max_model_len": 64, "max_num_seqs": 1, "chat": True}
    event["adapters"] = dict(each.replace("?", "").split("=") for each in options.adapter)
    os.write(channel, json.dumps(event).encode() + b"\n")
    await serving


if __name__ == "__main__":
    asyncio.run(main())
