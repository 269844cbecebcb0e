"""Real models that come and go in a real server: a moved alias, the gate, the operator's key, no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from hearth.serving import ServerProcess
from hearth.workspace import Workspace

OPTIONS = ("--num-threads", "1", "--log-level", "warning")


def post(server: ServerProcess, path: str, key: str | None = None, **body: object) -> tuple[int, dict, str]:
    """Status, body and version of an answer."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(server.base_url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response), response.headers.get("x-hearth-model")
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), ""


def models(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hearth", "models", *arguments, "--url", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def register(name: str, directory: Path, *, gated: bool = True) -> str:
    with Workspace.open() as workspace:
        version = workspace.registry.create_version(name, directory)
        if gated:
            workspace.registry.attach_report(version.ref, "parity", {"passed": True, "dtype": "float32"})
        return version.ref


def promote(ref: str) -> None:
    with Workspace.open() as workspace:
        workspace.registry.promote(ref, "production", force=True, reason="a test")


def gone(processes: list[psutil.Process], seconds: float = 20.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_moved_alias_is_picked_up_without_a_gap(
    tiny_base: Path, tiny_chat: Path, workspace_dir: Path
) -> None:
    register("qa", tiny_base)
    register("qa", tiny_chat)
    ungated = register("other", tiny_chat, gated=False)
    promote("qa@1")
    with ServerProcess.start(["qa@production"], options=OPTIONS, timeout=120) as server:
        old = psutil.Process(server.pids["qa"])
        answers: list[tuple[int, str]] = []
        done = threading.Event()

        def ask() -> None:
            while not done.is_set():
                status, _, version = post(
                    server, "/v1/completions", model="qa@production", prompt="x", max_tokens=4
                )
                answers.append((status, version))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            promote("qa@2")
            status, body, _ = post(server, "/models/reload", name="qa")
            assert (status, body["version"]) == (200, "qa@2"), body
            time.sleep(0.3)
        finally:
            done.set()
            asking.join()
        assert {status for status, _ in answers} == {200}
        versions = [version for _, version in answers]
        assert set(versions) == {"qa@1", "qa@2"}
        assert versions == sorted(versions)  # never back
        assert gone([old])
        status, body, _ = post(server, "/models/load", model="other")
        assert (status, body["error"]["code"]) == (409, "gate_closed")
        assert f"hearth parity {ungated}" in body["error"]["message"]
        assert [model["id"] for model in server.get("/v1/models")["data"]] == ["qa"]


@pytest.mark.slow
def test_the_command_line_loads_and_unloads(tiny_base: Path, tiny_chat: Path) -> None:
    with ServerProcess.start([tiny_base], options=OPTIONS, timeout=120) as server:
        url = server.base_url
        done = models("load", f"second={tiny_chat}", "--set", "num_threads=1", url=url)
        assert done.returncode == 0, done.stderr
        assert "as 'second'" in done.stderr
        assert post(server, "/v1/completions", model="second", prompt="x", max_tokens=2)[0] == 200
        before = psutil.Process(server.pid).children(recursive=True)
        done = models("unload", "second", url=url)
        assert done.returncode == 0, done.stderr
        assert len(before) - len(psutil.Process(server.pid).children(recursive=True)) >= 2
        done = models("unload", "second", url=url)
        assert (done.returncode, "not loaded" in done.stderr) == (2, True)
        done = models("load", str(tiny_chat), "--set", "dtyp=float32", url=url)
        assert (done.returncode, "dtyp" in done.stderr) == (2, True)


def test_no_server_is_an_error_that_says_so() -> None:
    done = models("unload", "x", url="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "no answer from http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
    assert models("unload", "x", url="file:///etc/passwd").returncode == 2


@pytest.mark.slow
def test_only_the_operators_key_changes_what_is_served(tiny_base: Path) -> None:
    environ = {"HEARTH_SERVE__ADMIN_KEY": "operator-key", "HEARTH_SERVE__MAX_MODELS": "1"}
    options = (*OPTIONS, "--api-key", "user-key-1")
    with ServerProcess.start([tiny_base], options=options, environ=environ, timeout=120) as server:
        for path in ("/models/load", "/v1/load_lora_adapter"):
            assert post(server, path, "user-key-1", model="x")[0] == 403
            assert post(server, path, model="x")[0] == 401
        status, body, _ = post(server, "/models/load", "operator-key", model=str(tiny_base), name="more")
        assert (status, body["error"]["code"]) == (409, "too_many_models")
        body = {"model": "tiny-base", "prompt": "x", "max_tokens": 1}
        assert post(server, "/v1/completions", "user-key-1", **body)[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_while_it_loads_leaves_no_process(tiny_base: Path, number: int) -> None:
    with ServerProcess.start([tiny_base], options=OPTIONS, timeout=120) as server:
        gateway = psutil.Process(server.pid)
        first = gateway.children(recursive=True)
        loading = threading.Thread(target=_load_until_it_ends, args=(server, str(tiny_base)))
        loading.start()
        deadline = time.monotonic() + 60
        while len(gateway.children(recursive=True)) <= len(first):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)
        family = gateway.children(recursive=True)
        os.kill(server.pid, number)
        code = server.wait(20)
        loading.join(20)
        assert not loading.is_alive()
        assert gone(family)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        assert "Traceback" not in server.log_tail(1000)


def _load_until_it_ends(server: ServerProcess, model: str) -> None:
    try:
        status, body, _ = post(server, "/models/load", model=model, name="second")
    except (urllib.error.URLError, OSError):
        return  # the server was killed
    assert (status, body["error"]["code"]) == (503, "shutting_down")
