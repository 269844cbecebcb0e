"""What every runner of a competitor shares: requests and answers as lines of JSON on stdin and stdout.

Needs the standard library only, because it runs in the competitors' own environments. A runner derives from
`Runner` and calls ``serve()``. The requests are ``{"do": "load", ...}``, ``{"do": "generate", "prompts":
[[token ids], ...], "num_tokens": n}`` and ``{"do": "close"}``; the answer is ``{"ok": {...}}`` or
``{"error": text}``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Step = Iterable[tuple[int, int]]  # (index of the prompt, token id) of each token that one step gave


class Runner:
    """One competitor in one process."""

    packages: Sequence[str] = ()  # whose versions are reported

    def load(self, **settings: Any) -> dict[str, Any]:
        """Load the model; returns facts worth recording."""
        raise NotImplementedError

    def prepare(self, prompts: list[list[int]], num_tokens: int) -> None:
        """What an application would have done before: not timed."""

    def steps(self, prompts: list[list[int]], num_tokens: int) -> Iterator[Step]:
        """Generate greedily exactly ``num_tokens`` for each prompt; yields after each step of the engine."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what would outlive the process."""

    def versions(self) -> dict[str, str]:
        found = {"python": platform.python_version()}
        for name in self.packages:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        what = request.pop("do")
        if what == "load":
            started = time.perf_counter()
            facts = self.load(**request)
            return {"seconds": time.perf_counter() - started, "versions": self.versions(), **facts}
        if what == "generate":
            self.prepare(request["prompts"], request["num_tokens"])
            return timed_steps(self.steps(request["prompts"], request["num_tokens"]), len(request["prompts"]))
        raise ValueError(f"no such request: {what}")

    def serve(self) -> None:
        """Answer until stdin ends. Whatever libraries print goes to stderr."""
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "close":
                break
            try:
                answer: dict[str, Any] = {"ok": self.answer(request)}
            except Exception as error:  # noqa: BLE001 - the driver shows it in the competitor's row
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        self.close()


def timed_steps(steps: Iterator[Step], num_prompts: int) -> dict[str, Any]:
    """When the tokens came: seconds and number of tokens until each prompt had one, and until the end."""
    token_ids: list[list[int]] = [[] for _ in range(num_prompts)]
    first, tokens_by_first, waiting = 0.0, 0, num_prompts
    started = time.perf_counter()
    for step in steps:
        for index, token_id in step:
            waiting -= not token_ids[index]
            token_ids[index].append(token_id)
        if not waiting and not first:
            first = time.perf_counter() - started
            tokens_by_first = sum(map(len, token_ids))
    return {
        "first": first,
        "tokens_by_first": tokens_by_first,
        "total": time.perf_counter() - started,
        "tokens": sum(map(len, token_ids)),
        "last_ids": [ids[-1] for ids in token_ids],
        "token_ids": token_ids[0],
    }
