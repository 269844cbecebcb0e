"""llama.cpp, by the C interface that llama-cpp-python wraps, behind the runner protocol."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from protocol import Runner, Step

NUM_BATCHED_TOKENS = 2048


class LlamaRunner(Runner):
    packages = ("llama-cpp-python", "numpy")

    def load(self, model: str, *, num_threads: int, **context: Any) -> dict[str, Any]:
        import llama_cpp
        import numpy as np

        self.llama, self.np = llama_cpp, np
        self.num_threads, self.settings = num_threads, context
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {model}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(NUM_BATCHED_TOKENS, 0, 1)
        self.context, self.shape = None, (0, 0)
        return {"system_info": llama_cpp.llama_print_system_info().decode()}

    def prepare(self, prompts: list[list[int]], num_tokens: int) -> None:
        """A context made for this many sequences of this length: its best case."""
        shape = (len(prompts), max(map(len, prompts)) + num_tokens)
        if shape == self.shape:
            return
        if self.context:
            self.llama.llama_free(self.context)
        params = self.llama.llama_context_default_params()
        params.n_seq_max = shape[0]
        params.n_ctx = shape[0] * -(-shape[1] // 256) * 256
        params.n_batch = NUM_BATCHED_TOKENS
        params.n_threads = params.n_threads_batch = self.num_threads
        for name, value in self.settings.items():
            setattr(params, name, value)
        self.context, self.shape = self.llama.llama_init_from_model(self.model, params), shape
        if not self.context:
            raise RuntimeError("llama.cpp could not make a context")

    def _decode(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """Compute (token id, position, sequence, whether its logits are wanted) of at most one batch."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token_id, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token_id, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, wanted
        code = self.llama.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def _greedy(self, num_rows: int) -> list[int]:
        pointer = self.llama.llama_get_logits(self.context)
        logits = self.np.ctypeslib.as_array(pointer, shape=(num_rows, self.vocab_size))
        return [int(token_id) for token_id in logits.argmax(axis=1)]

    def steps(self, prompts: list[list[int]], num_tokens: int) -> Iterator[Step]:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), False)
        rows = [
            (token_id, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token_id in enumerate(prompt)
        ]
        last: list[int] = []
        for start in range(0, len(rows), NUM_BATCHED_TOKENS):
            chunk = rows[start : start + NUM_BATCHED_TOKENS]
            self._decode(chunk)
            finished = [sequence for _, _, sequence, wanted in chunk if wanted]
            if finished:
                last += self._greedy(len(finished))
                yield list(zip(finished, last[-len(finished) :], strict=True))
        for i in range(num_tokens - 1):
            self._decode([(last[s], len(prompt) + i, s, True) for s, prompt in enumerate(prompts)])
            last = self._greedy(len(prompts))
            yield list(enumerate(last))


if __name__ == "__main__":
    LlamaRunner().serve()
