"""Real servers whose processes are killed, stopped, interrupted: an error at once, then recovery."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import psutil
import pytest
from openai import OpenAI

from hearth.serving import ServerProcess
from hearth.workspace import Workspace

MODEL = "tiny-base"
OPTIONS = ("--num-threads", "1", "--log-level", "warning")


@pytest.fixture
def impatient(tmp_path: Path) -> tuple[str, ...]:
    """Settings that notice a hang quickly, and on a busy machine may see one where there is none."""
    config = tmp_path / "serve.yaml"
    config.write_text(
        "health_interval: 0.2\nhealth_timeout: 3\nengine_hang_timeout: 5\nrestart_backoff: 0.1\n"
    )
    return (*OPTIONS, "--config", str(config))


def client_of(server: ServerProcess, key: str = "none") -> OpenAI:
    return OpenAI(base_url=server.base_url + "/v1", api_key=key, max_retries=0, timeout=60)


def until(condition: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def engine_pid(server: ServerProcess) -> int:
    return server.get("/stats")["models"][MODEL]["worker"]["engine_pid"]


def answers(client: OpenAI) -> str:
    return client.completions.create(model=MODEL, prompt="hello", max_tokens=8, temperature=0).choices[0].text


def recovers(server: ServerProcess, client: OpenAI, expected: str) -> None:
    statuses: set[int] = set()

    def works() -> bool:
        try:
            return answers(client) == expected
        except openai.InternalServerError as error:
            statuses.add(error.status_code)
            return False

    until(works)
    assert statuses <= {503}
    assert server.running


def is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@contextlib.contextmanager
def watched(server: ServerProcess) -> Iterator[dict[str, list[int]]]:
    """The statuses of /readyz and /health while the block runs, each once for as long as it lasted."""
    seen: dict[str, list[int]] = {"/readyz": [], "/health": []}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for path, statuses in seen.items():
                try:
                    with urllib.request.urlopen(server.base_url + path, timeout=30) as page:
                        status = page.status
                except urllib.error.HTTPError as error:
                    status = error.code
                if statuses[-1:] != [status]:
                    statuses.append(status)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def busy_stream(client: OpenAI) -> Iterator[str]:
    """A stream that lasts: greedy, as long as the context."""
    chunks = client.completions.create(
        model=MODEL,
        prompt="x",
        max_tokens=250,
        temperature=0,
        stream=True,
        n=16,
        extra_body={"ignore_eos": True},
    )
    for chunk in chunks:
        yield chunk.choices[0].text


@pytest.mark.parametrize("which", ["worker", pytest.param("engine", marks=pytest.mark.slow)])
def test_a_killed_process_is_an_error_at_once_and_then_replaced(tiny_base: Path, which: str) -> None:
    with (
        ServerProcess.start([tiny_base], options=OPTIONS, timeout=120) as server,
        client_of(server) as client,
    ):
        expected = answers(client)
        worker, engine = server.pids[MODEL], psutil.Process(engine_pid(server))
        assert worker is not None
        stream = busy_stream(client)
        next(stream)
        os.kill(worker if which == "worker" else engine.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(openai.APIError) as caught:
            for _ in stream:
                pass
        assert time.monotonic() - started < 20
        # An engine takes its worker with it, so either may be the first to tell.
        assert caught.value.code in ("worker_failed", "engine_dead")
        recovers(server, client, expected)
        until(lambda: is_gone(engine))
        assert server.get("/stats")["models"][MODEL]["restarts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("which", ["worker", "engine"])
def test_a_stopped_process_is_noticed_and_replaced(
    tiny_base: Path, impatient: tuple[str, ...], which: str
) -> None:
    with (
        ServerProcess.start([tiny_base], options=impatient, timeout=120) as server,
        client_of(server) as client,
    ):
        expected = answers(client)
        worker, engine = server.pids[MODEL], engine_pid(server)
        assert worker is not None
        victims = [psutil.Process(worker), psutil.Process(engine)]
        with watched(server) as seen:
            until(lambda: seen["/readyz"] == seen["/health"] == [200])
            os.kill(worker if which == "worker" else engine, signal.SIGSTOP)
            with pytest.raises(openai.InternalServerError) as caught:
                answers(client)
            assert caught.value.status_code == 503
            recovers(server, client, expected)
            until(lambda: all(statuses[-1] == 200 for statuses in seen.values()))
            assert all(statuses[:2] == [200, 503] for statuses in seen.values())
        until(lambda: all(is_gone(victim) for victim in victims))


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_outlives_a_killed_gateway(tiny_base: Path, stopped: bool) -> None:
    with ServerProcess.start([tiny_base], options=OPTIONS, timeout=120) as server:
        worker = server.pids[MODEL]
        assert worker is not None
        family = [psutil.Process(worker), psutil.Process(engine_pid(server))]
        if stopped:
            family[0].suspend()
        os.kill(server.pid, signal.SIGKILL)
        server.wait(10)
        until(lambda: all(is_gone(process) for process in family), seconds=20)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_open_requests_finish(tiny_base: Path, number: int) -> None:
    with (
        ServerProcess.start([tiny_base], options=OPTIONS, timeout=120) as server,
        client_of(server) as client,
    ):
        worker = server.pids[MODEL]
        assert worker is not None
        family = [psutil.Process(worker), psutil.Process(engine_pid(server))]
        stream = busy_stream(client)
        pieces = [next(stream)]
        server.signal(number)
        time.sleep(0.3)
        with pytest.raises(openai.APIConnectionError), client_of(server) as late:
            answers(late)
        pieces.extend(stream)
        assert len(pieces) > 250
        assert server.wait(30) == 0
        until(lambda: all(is_gone(process) for process in family))
        assert "Traceback" not in server.log_tail(1000)


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait(tiny_base: Path) -> None:
    with (
        ServerProcess.start([tiny_base], options=OPTIONS, timeout=120) as server,
        client_of(server) as client,
    ):
        # A stopped engine cannot finish the request, so that there is one to wait for however fast it is.
        psutil.Process(engine_pid(server)).suspend()
        errors: list[openai.APIError] = []

        def read() -> None:
            try:
                answers(client)
            except openai.APIError as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: server.get("/stats")["models"][MODEL]["in_flight"] == 1)
        server.signal(signal.SIGINT)
        time.sleep(0.1)
        server.signal(signal.SIGINT)
        code = server.wait(20)
        reader.join(20)
        assert not reader.is_alive()
        assert [error.code for error in errors] == ["shutting_down"]
        assert code == 130
        assert "Traceback" not in server.log_tail(1000)


@pytest.mark.slow
def test_keys_of_the_workspace(tiny_base: Path, workspace_dir: Path) -> None:
    with Workspace.open() as workspace:
        key, secret = workspace.keys.create("test")
        options = ("--require-api-keys", "--num-threads", "1", "--log-level", "info", "--log-format", "json")
        with ServerProcess.start([tiny_base], options=options, timeout=120) as server:
            with client_of(server, secret) as client:
                assert answers(client) is not None
            for wrong in ("hk-wrong", "none"):
                with client_of(server, wrong) as client, pytest.raises(openai.AuthenticationError) as caught:
                    answers(client)
                assert caught.value.code == "invalid_api_key"
            workspace.keys.revoke(key.id)
            with client_of(server, secret) as client:

                def refused() -> bool:
                    try:
                        answers(client)
                    except openai.AuthenticationError:
                        return True
                    return False

                until(refused, seconds=20)
            log = server.log_tail(1000)
            assert secret not in log
            assert "hello" not in log
