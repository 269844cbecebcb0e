"""The engine beside `transformers.generate`: prefill and decode, at batch 1 and 16.

    python benchmarks/engine.py            # the 474M-parameter model of the notes, random bf16 weights
    python benchmarks/engine.py --quick    # a tiny model, a smoke test

Both run in one process on the same weights values and token ids, in turns. Decode counts the tokens after the
first; prefill is the time to the first token.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, alternate, hardware, ratio_table, summary, write_result
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hearth.engine import Engine, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "474M": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 32768,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
}


def model_path(shape: str) -> Path:
    """The model's directory; made once, with weights from a fixed seed."""
    path = RESULTS / "models" / f"qwen3-{shape}"
    if not (path / "config.json").exists():
        torch.manual_seed(0)
        config = Qwen3Config(
            **SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None
        )
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(path)
    return path


def prompts(batch: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (batch, length), generator=generator).tolist()


class Competitor:
    """Measures prefill and decode in tokens per second; fresh prompts each time, so that no cache helps."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.calls = 0

    def timed_generate(self, batch: list[list[int]], num_tokens: int) -> tuple[float, float]:
        """Seconds to the first tokens of all, and seconds in all."""
        raise NotImplementedError

    def measure(self, batch: int, length: int, num_tokens: int, what: str) -> float:
        self.calls += 1
        first, total = self.timed_generate(
            prompts(batch, length, self.vocab_size, seed=self.calls), 1 if what == "prefill" else num_tokens
        )
        if what == "prefill":
            return batch * length / first
        return batch * (num_tokens - 1) / (total - first)


class Hearth(Competitor):
    def __init__(self, path: Path, vocab_size: int, **settings: Any) -> None:
        super().__init__(vocab_size)
        # Without the prefix cache a freed block is used again at once. With it every new prompt would take
        # memory that was never touched, and the first rounds would measure the kernel zeroing pages.
        settings = {"prefix_cache": False, **settings}
        self.engine = Engine.from_model(
            AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16"), **settings
        )

    def timed_generate(self, batch: list[list[int]], num_tokens: int) -> tuple[float, float]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        started = time.perf_counter()
        for i, prompt in enumerate(batch):
            self.engine.add_request(f"{self.calls}-{i}", prompt, params)
        seen: set[str] = set()
        first = 0.0
        while self.engine.has_work:
            seen.update(output.request_id for output in self.engine.step())
            if not first and len(seen) == len(batch):
                first = time.perf_counter() - started
        return first, time.perf_counter() - started


class Transformers(Competitor):
    def __init__(self, path: Path, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16").eval()

    @torch.inference_mode()
    def timed_generate(self, batch: list[list[int]], num_tokens: int) -> tuple[float, float]:
        first: list[float] = []

        ids = torch.tensor(batch)
        started = time.perf_counter()

        # A streamer is refused for batches; a logits processor sees the first logits of any.
        def first_seen(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not first:
                first.append(time.perf_counter())
            return scores

        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[first_seen],
        )
        return first[0] - started, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--num-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, help="default: every core that the process may use")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()
    shape = "tiny" if arguments.quick else "474M"
    rounds = 1 if arguments.quick else arguments.rounds
    length = 32 if arguments.quick else arguments.prompt_length
    num_tokens = 8 if arguments.quick else arguments.num_tokens

    machine = hardware()
    torch.set_num_threads(arguments.threads or machine["num_cores"])
    path = model_path(shape)
    vocab_size = SHAPES[shape]["vocab_size"]
    competitors = {"hearth": Hearth(path, vocab_size), "transformers": Transformers(path, vocab_size)}
    rows: dict[str, dict[str, list[float]]] = {}
    for batch in arguments.batches:
        for what in ("prefill", "decode"):
            calls: dict[str, Callable[[], float]] = {
                name: (lambda c=competitor, b=batch, w=what: c.measure(b, length, num_tokens, w))
                for name, competitor in competitors.items()
            }
            rows[f"{what}, batch {batch}"] = alternate(calls, rounds=rounds)
    settings = {
        "shape": shape,
        "prompt_length": length,
        "num_tokens": num_tokens,
        "threads": torch.get_num_threads(),
    }
    print(f"{machine['cpu']}, {machine['num_cores']} cores, torch {torch.__version__}")
    print(f"{shape} bf16, prompts of {length} tokens, {num_tokens} generated\n")
    print(ratio_table(rows, ours="hearth", unit="tok/s"))
    results = {label: {name: summary(values) for name, values in row.items()} for label, row in rows.items()}
    stored = write_result(
        "engine-quick" if arguments.quick else "engine", results, settings=settings, machine=machine
    )
    print(f"\nwritten to {os.path.relpath(stored)}")


if __name__ == "__main__":
    main()
