"""One competitor: a process in its own environment, driven by lines of JSON, that sleeps while others run."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from peers.install import PEERS, is_installed, python_of


class CompetitorFailed(Exception):
    """The process died, took too long, or answered with an error."""


@dataclass(frozen=True)
class Spec:
    """What to run. ``peer``: the directory of its runner; ``load``: what the runner's ``load`` is given."""

    name: str
    peer: str
    load: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, with what to do."""
        if self.peer == "hearth" or is_installed(self.peer):
            return None
        return f"{self.name} is not installed: python benchmarks/peers/install.py {self.peer}"

    @property
    def python(self) -> str:
        return sys.executable if self.peer == "hearth" else str(python_of(self.peer))


class Competitor:
    """Started at once, without a model; `load` loads it."""

    def __init__(self, spec: Spec, *, timeout: float = 240.0) -> None:
        self.spec, self.timeout = spec, timeout
        self.facts: dict[str, Any] = {}
        self.started = time.perf_counter()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [spec.python, str(PEERS / spec.peer / "runner.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **spec.environment},
            start_new_session=True,  # a group of its own: all its processes stop and go on together
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; raises `CompetitorFailed`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise CompetitorFailed(f"{self.spec.name} died: {self.last_words()}") from None
        ready, _, _ = select.select([self._process.stdout], [], [], self.timeout)
        if not ready:
            self.kill()
            raise CompetitorFailed(f"{self.spec.name} did not answer within {self.timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise CompetitorFailed(f"{self.spec.name} died: {self.last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise CompetitorFailed(f"{self.spec.name}: {answer['error'].splitlines()[0]}")
        result: dict[str, Any] = answer["ok"]
        return result

    def load(self) -> None:
        self.facts = self.ask(do="load", **self.spec.load)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """Greedy tokens; see `peers.protocol.timed_steps` for the answer. All must have come."""
        answer = self.ask(do="generate", prompts=prompts, num_tokens=num_tokens)
        if answer["tokens"] != len(prompts) * num_tokens:
            raise CompetitorFailed(
                f"{self.spec.name} gave {answer['tokens']} tokens, not {len(prompts)} x {num_tokens}"
            )
        return answer

    def last_words(self) -> str:
        """The end of what it wrote to stderr."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    # -- turns -------------------------------------------------------------------------------------------
    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def pause(self) -> None:
        """Stop all its processes, so that none spins or ticks while another is measured."""
        self._signal(signal.SIGSTOP)

    @contextlib.contextmanager
    def turn(self) -> Iterator[Competitor]:
        self._signal(signal.SIGCONT)
        try:
            yield self
        finally:
            self.pause()

    # -- memory ------------------------------------------------------------------------------------------
    def memory(self) -> dict[str, int]:
        """Bytes, over all its processes: the peaks of what was resident, and what is anonymous now."""
        peak = anonymous = 0
        try:
            root = psutil.Process(self._process.pid)
            processes = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return {"peak": 0, "anonymous": 0}
        for process in processes:
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                fields = dict(line.split(":", 1) for line in lines)
                peak += int(fields.get("VmHWM", "0").split()[0]) * 1024
                anonymous += int(fields.get("RssAnon", "0").split()[0]) * 1024
        return {"peak": peak, "anonymous": anonymous}

    # -- the end -----------------------------------------------------------------------------------------
    def close(self) -> None:
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            assert self._process.stdin is not None
            self._process.stdin.write(b'{"do": "close"}\n')
            self._process.stdin.close()
            self._process.wait(10)
        self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
