"""Hearth's engine behind the runner protocol."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from protocol import Runner, Step


class HearthRunner(Runner):
    packages = ("hearth-lm", "torch", "transformers", "numba", "numpy")

    def load(self, model: str, *, own_process: bool = False, **settings: Any) -> dict[str, Any]:
        if own_process:
            return self._load_in_its_own_process(model, settings)
        from hearth.engine import Engine

        self.engine = Engine.load(model, **settings)
        self.calls = 0
        return {"model_info": self.engine.model_info}

    def _load_in_its_own_process(self, model: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Start an `AsyncEngine`, take one token from it, and close it: a measurement of the start only."""
        from hearth.engine import AsyncEngine, SamplingParams

        async def first_token() -> None:
            async with await AsyncEngine.start(model, **settings) as engine:
                async for _ in engine.generate(
                    [5] * 16, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
                ):
                    break

        asyncio.run(first_token())
        return {}

    def steps(self, prompts: list[list[int]], num_tokens: int) -> Iterator[Step]:
        from hearth.engine import SamplingParams

        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        self.calls += 1
        for index, prompt in enumerate(prompts):
            self.engine.add_request(f"{self.calls}/{index}", prompt, params)
        while self.engine.has_work:
            outputs = self.engine.step()
            yield [
                (int(output.request_id.split("/")[1]), token_id)
                for output in outputs
                for token_id in output.token_ids
            ]

    def close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()


if __name__ == "__main__":
    HearthRunner().serve()
