"""Replay a trace of arrivals against an OpenAI-compatible server, streaming, and time the tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from inference.figures import Arrival, percentile
from peers.install import python_of


@dataclass
class Times:
    """Seconds to the first token of each request, and between the pieces of its stream after it."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        return {
            f"{what}, p{percent}": 1e3 * percentile(values, percent)
            for what, values in (("first token", self.first), ("between tokens", self.between))
            for percent in (50, 95)
            if values
        }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def command_of(peer: str, model: Path, port: int, max_model_len: int, max_num_seqs: int) -> list[str]:
    """How to serve the model with Hearth or vLLM, under the name "model"."""
    sizes = ["--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)]
    if peer == "hearth":
        return [sys.executable, "-m", "hearth", "serve", f"model={model}", "--port", str(port), *sizes]
    server = [str(python_of("vllm")), "-m", "vllm.entrypoints.openai.api_server"]
    return [*server, "--model", str(model), "--served-model-name", "model", "--port", str(port), *sizes]


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, environment: Mapping[str, str], wait: float) -> Iterator[str]:
    """The server's address, once it answers ``/health``."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + wait
            while not asyncio.run(_is_healthy(f"http://127.0.0.1:{port}")):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    words = log.read().decode(errors="replace").strip().splitlines()[-1:]
                    raise RuntimeError(f"the server did not start: {' '.join(words)[:300]}")
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def _is_healthy(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


async def _ask(
    session: aiohttp.ClientSession, url: str, prompt: list[int], num_tokens: int, times: Times
) -> None:
    body: dict[str, Any] = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    began = last = time.perf_counter()
    seen = False
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                times.failed.append(f"{response.status}: {(await response.text())[:200]}")
                return
            async for line in response.content:
                if not line.startswith(b"data: {") or not _has_text(line):
                    continue
                now = time.perf_counter()
                (times.between if seen else times.first).append(now - last)
                last, seen = now, True
    except (aiohttp.ClientError, TimeoutError) as error:
        times.failed.append(f"{type(error).__name__}: {error}")
        return
    if not seen:
        times.failed.append(f"no token within {time.perf_counter() - began:.1f} s")


def _has_text(line: bytes) -> bool:
    choices = json.loads(line[len(b"data: ") :]).get("choices") or []
    return bool(choices and choices[0].get("text"))


async def replay(url: str, arrivals: Sequence[Arrival], prompts: Sequence[list[int]]) -> Times:
    """Send each prompt at its time, whether the earlier ones are answered or not."""
    times = Times()
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        # A first request on the side: connections, compilation and first touches are not what is measured.
        await _ask(session, url, prompts[0][:64], 4, Times())
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for arrival, prompt in zip(arrivals, prompts, strict=True):
                await asyncio.sleep(max(0.0, arrival.at - (time.perf_counter() - began)))
                group.create_task(_ask(session, url, prompt, arrival.num_output_tokens, times))
    return times
