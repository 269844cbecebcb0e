"""The engine in its own process: the same answers, and no fault that leaves anyone waiting."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hearth.engine import AsyncEngine, Engine, SamplingParams, wire
from hearth.errors import EngineDeadError, ModelError, RequestError

SETTINGS: dict[str, Any] = {"max_model_len": 200, "num_threads": 1}


@pytest.fixture
async def engine(model_dir: Path) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(model_dir, **SETTINGS)
    yield engine
    await engine.close()


async def collect(
    engine: AsyncEngine, prompt: Any, params: SamplingParams
) -> tuple[str, list[int], str | None]:
    text, tokens, reason = "", [], None
    async for output in engine.generate(prompt, params):
        text += output.text
        tokens += output.token_ids
        reason = output.finish_reason
    return text, tokens, reason


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


async def test_an_id_is_free_at_once_when_its_request_is_left(engine: AsyncEngine) -> None:
    expected = await collect(engine, "dog", greedy(20))
    for _ in range(5):
        async with contextlib.aclosing(engine.generate("fox", greedy(150), request_id="mine")) as stream:
            assert (await anext(stream)).request_id == "mine"
        text, tokens = "", []
        async with contextlib.aclosing(engine.generate("dog", greedy(20), request_id="mine")) as stream:
            async for output in stream:
                assert output.request_id == "mine"
                text += output.text
                tokens += output.token_ids
        assert (text, tokens, output.finish_reason) == expected


async def test_life_of_an_engine(engine: AsyncEngine, model_dir: Path) -> None:
    """One process for several checks, because starting one takes seconds."""
    assert engine.is_alive
    assert engine.max_model_len == 200
    assert engine.tokenizer is not None

    prompts = ["the quick brown fox", "dog", [5, 6, 7]]
    with Engine.load(model_dir, **SETTINGS) as sync:
        expected = sync.generate(prompts, greedy(30))
    got = await asyncio.gather(*(collect(engine, prompt, greedy(30)) for prompt in prompts))
    assert [(c.text, c.token_ids, c.finish_reason) for c in expected] == got

    # A bad request fails alone, beside a good one.
    good = asyncio.create_task(collect(engine, "dog", greedy(30)))
    for bad in ([5] * 300, [], [999], [5.0], [2**70], "\udcff"):
        with pytest.raises(RequestError):
            await collect(engine, bad, greedy(5))
    assert (await good)[1] == expected[1].token_ids

    # n sequences under one id; the stream ends after the last.
    params = SamplingParams(max_tokens=5, n=3, seed=3, ignore_eos=True)
    indices = [o.index async for o in engine.generate("fox", params) if o.finished]
    assert sorted(indices) == [0, 1, 2]

    # Cancelling a task, and closing an iterator, abort the request.
    task = asyncio.create_task(collect(engine, "the", greedy(190)))
    stream = engine.generate("fox", greedy(190))
    await anext(stream)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await stream.aclose()
    stats = await engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)

    # abort() ends a stream that somebody else reads.
    stream = engine.generate("fox", greedy(190), request_id="mine")
    await anext(stream)
    await engine.abort("mine")
    assert [o.finish_reason async for o in stream][-1] in ("abort", "length")

    await asyncio.sleep(1.2)  # an idle loop is still heard
    assert engine.heartbeat_age < 1.0

    # Ctrl-C in the terminal reaches the application's group, not the engine's.
    assert os.getpgid(engine.pid) != os.getpgid(0)
    os.kill(engine.pid, signal.SIGINT)
    assert (await collect(engine, "dog", greedy(30)))[1] == expected[1].token_ids


async def test_kill_is_noticed_at_once_by_everyone(engine: AsyncEngine) -> None:
    async def forever() -> None:
        while True:
            await collect(engine, "the", greedy(150))

    tasks = [asyncio.create_task(forever()) for _ in range(3)]
    await asyncio.sleep(0.3)
    started = time.monotonic()
    os.kill(engine.pid, signal.SIGKILL)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, EngineDeadError) for result in results)
    assert time.monotonic() - started < 5.0
    assert not engine.is_alive
    with pytest.raises(EngineDeadError):
        await engine.stats()
    with pytest.raises(EngineDeadError):
        await collect(engine, "the", greedy(5))


async def test_a_command_that_cannot_be_read_is_no_silence(engine: AsyncEngine) -> None:
    engine._writer.write(b"\x01\x00\x00\x00\xc1")
    with pytest.raises(EngineDeadError):
        await collect(engine, "the", greedy(150))


async def test_an_event_that_cannot_be_read_ends_the_engine(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(body: bytes) -> Any:
        raise ValueError("no event")

    task = asyncio.create_task(collect(engine, "the", greedy(150)))
    await asyncio.sleep(0)
    monkeypatch.setattr(wire, "decode_event", unreadable)
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(task, 10)
    assert not engine.is_alive


async def test_close_drains_if_asked_to(model_dir: Path) -> None:
    engine = await AsyncEngine.start(model_dir, **SETTINGS)
    task = asyncio.create_task(collect(engine, "the", greedy(100)))
    await asyncio.sleep(0.05)
    await engine.close(drain=True)
    text, tokens, reason = await task
    assert (len(tokens), reason) == (100, "length")
    assert text
    assert not psutil.pid_exists(engine.pid)


async def test_close_at_once_ends_what_runs(model_dir: Path) -> None:
    engine = await AsyncEngine.start(model_dir, **SETTINGS)
    stream = engine.generate("the", greedy(190))
    await anext(stream)
    await engine.close()
    with contextlib.suppress(EngineDeadError):
        assert [o.finish_reason async for o in stream][-1] == "abort"
    assert not engine.is_alive


@pytest.mark.slow
async def test_close_does_not_wait_for_an_engine_that_does_not_read(model_dir: Path) -> None:
    engine = await AsyncEngine.start(model_dir, **SETTINGS)
    os.kill(engine.pid, signal.SIGSTOP)
    engine._writer.write(bytes(1 << 22))  # more than the socket holds, as from very many requests
    async with asyncio.timeout(30):
        await engine.close()
    assert not psutil.pid_exists(engine.pid)


async def test_what_fails_in_loading_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        await AsyncEngine.start(tmp_path / "nowhere")


def test_the_engine_dies_with_its_application(model_dir: Path) -> None:
    code = (
        "import asyncio, sys, time\nfrom hearth.engine import AsyncEngine\n"
        "async def main():\n"
        "    engine = await AsyncEngine.start(sys.argv[1], max_model_len=64)\n"
        "    print(engine.pid, flush=True)\n    time.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(model_dir)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        pid = int(parent.stdout.readline())
        child = psutil.Process(pid)
        parent.kill()
    child.wait(timeout=10)
    assert not child.is_running()
