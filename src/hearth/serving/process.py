"""A server as a child process, for programs and tests: `hearth serve` from start to end."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from hearth.errors import ServingError

_LOG_LINES = 20


class ServerProcess:
    """`hearth serve MODEL … --port 0` in a process of its own, ready when ``start`` returns.

    with ServerProcess.start(models=["qa@production"]) as server:
        client = openai.OpenAI(base_url=server.base_url + "/v1", api_key="none")
    """

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process = process
        self._log = log
        self.facts: dict[str, Any] = {}

    @classmethod
    def start(
        cls,
        models: Sequence[str | Path],
        *,
        port: int = 0,
        options: Sequence[str] = (),
        workspace_dir: Path | str | None = None,
        environ: dict[str, str] | None = None,
        timeout: float = 600.0,
    ) -> Self:
        """Start and wait until every model is ready.

        ``options`` are further arguments of `hearth serve`. Raises ServingError with the end of the server's
        log if it ends early or is not ready after ``timeout`` seconds.
        """
        environment = {**os.environ, **(environ or {})}
        if workspace_dir is not None:
            environment["HEARTH_HOME"] = str(workspace_dir)
        command = [sys.executable, "-m", "hearth", "serve", *map(str, models), "--port", str(port), "--json"]
        log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", prefix="hearth-serve-")  # noqa: SIM115
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        server = cls(process, log)
        try:
            server.facts = server._wait_until_ready(timeout)
        except BaseException:
            server.stop(timeout=0.0)
            raise
        return server

    def _wait_until_ready(self, timeout: float) -> dict[str, Any]:
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        stdout = self._process.stdout
        assert stdout is not None
        threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
        try:
            line = lines.get(timeout=timeout)
        except queue.Empty:
            raise ServingError(f"the server was not ready after {timeout:g} s:\n{self.log_tail()}") from None
        if not line:
            code = self._process.wait()
            raise ServingError(f"the server ended with exit code {code}:\n{self.log_tail()}")
        facts: dict[str, Any] = json.loads(line)
        return facts

    @property
    def base_url(self) -> str:
        """Where it listens, without a path: OpenAI's base URL is this plus ``/v1``."""
        return str(self.facts["url"])

    @property
    def pid(self) -> int:
        """The gateway's process id."""
        return self._process.pid

    @property
    def pids(self) -> dict[str, int | None]:
        """The worker's process id of each model, now; it changes with a restart."""
        stats = self.get("/stats")
        return {name: model["pid"] for name, model in stats["models"].items()}

    @property
    def running(self) -> bool:
        """Whether the gateway's process runs."""
        return self._process.poll() is None

    def get(self, path: str, *, api_key: str | None = None) -> Any:
        """The JSON that the server answers to GET ``path``."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        request = urllib.request.Request(self.base_url + path, headers=headers)  # noqa: S310 - our own server
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
            return json.load(response)

    def log_tail(self, num_lines: int = _LOG_LINES) -> str:
        """The last lines of its log."""
        self._log.flush()
        with contextlib.suppress(ValueError, OSError):
            self._log.seek(0)
            return "\n".join(self._log.read().splitlines()[-num_lines:])
        return ""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; returns the exit code. Raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout)

    def signal(self, number: int) -> None:
        """Send a signal to the gateway."""
        self._process.send_signal(number)

    def stop(self, timeout: float = 40.0) -> int:
        """Drain and end; after ``timeout`` seconds kill. Returns the exit code."""
        if self._process.poll() is None and timeout > 0:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        if self._process.poll() is None:
            self._process.kill()  # its workers see their lifeline end
        code = self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
