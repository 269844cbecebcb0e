"""transformers behind the runner protocol: `generate`, or, ``continuous``, what `generate_batch` runs."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from protocol import Runner, Step

PAGE_SIZE = 256  # its default


class TransformersRunner(Runner):
    packages = ("transformers", "torch", "accelerate")

    def load(self, model: str, *, num_threads: int, continuous: bool = False) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        self.torch, self.continuous = torch, continuous
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16").eval()
        return {}

    def steps(self, prompts: list[list[int]], num_tokens: int) -> Iterator[Step]:
        if self.continuous:
            return self._continuous_steps(prompts, num_tokens)
        return self._generate_steps(prompts, num_tokens)

    def _generate_steps(self, prompts: list[list[int]], num_tokens: int) -> Iterator[Step]:
        """`generate` in a thread; a stopping criterion, which sees the ids after each step, tells them."""
        told: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        ids = self.torch.tensor(prompts)

        def tell(ids: Any, *_: Any, **__: Any) -> Any:
            told.put(ids[:, -1].tolist())
            return self.torch.zeros(len(ids), dtype=self.torch.bool)

        def run() -> None:
            try:
                with self.torch.inference_mode():
                    self.model.generate(
                        ids,
                        attention_mask=self.torch.ones_like(ids),
                        max_new_tokens=num_tokens,
                        min_new_tokens=num_tokens,
                        do_sample=False,
                        pad_token_id=0,
                        stopping_criteria=[tell],
                    )
                told.put(None)
            except BaseException as error:  # noqa: BLE001 - raised again by the generator
                told.put(error)

        threading.Thread(target=run, daemon=True).start()
        while (tokens := told.get()) is not None:
            if isinstance(tokens, BaseException):
                raise tokens
            yield list(enumerate(tokens))

    def _continuous_steps(self, prompts: list[list[int]], num_tokens: int) -> Iterator[Step]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        # By itself it takes most of the free memory for its cache.
        pages = sum(-(-(len(prompt) + num_tokens) // PAGE_SIZE) for prompt in prompts)
        cache = ContinuousBatchingConfig(page_size=PAGE_SIZE, num_blocks=pages + 2)
        with self.model.continuous_batching_context_manager(
            config, continuous_batching_config=cache, block=True, timeout=5
        ) as manager:
            index_of = {
                manager.add_request(prompt, f"request-{i}", max_new_tokens=num_tokens, streaming=True): i
                for i, prompt in enumerate(prompts)
            }
            seen = [0] * len(prompts)
            unfinished = len(prompts)
            while unfinished:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the generation thread ended")
                    continue
                if result.error:
                    raise RuntimeError(result.error)
                index = index_of[result.request_id]
                new = result.generated_tokens[seen[index] :]
                seen[index] += len(new)
                unfinished -= bool(result.is_finished())
                yield [(index, token_id) for token_id in new]


if __name__ == "__main__":
    TransformersRunner().serve()
