"""The engine on a GPU beside transformers' continuous batching and beside what the card can do.

    python benchmarks/engine_gpu.py                    # 1B and 8B shapes, batches of 1, 32 and 256
    python benchmarks/engine_gpu.py --shapes 1B --batches 1 32
    python benchmarks/engine_gpu.py --quick            # a tiny model, a smoke test; also on a CPU

Models have random bf16 weights, made on the device; nothing is read from disk or network. For each shape it
prints prefill and decode in tokens per second of both, and the roofline: at decode the time to read the
weights and the keys and values once at the bandwidth that a large copy reached on this card, at prefill the
time of the linear layers' arithmetic at the rate that a large bf16 matrix product reached. Prefill counts
from the first request to the last first token, decode the tokens after the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from common import hardware, summary, write_result
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from hearth.engine import Engine, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 128, "vocab_size": 512,
    },
}  # fmt: skip


def make_model(shape: str, device: torch.device, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, eos_token_id=None)
    config._attn_implementation = attention
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@dataclasses.dataclass
class Roofline:
    """What this card reached in two simple operations."""

    bytes_per_second: float
    flops_per_second: float

    def decode(self, model: PreTrainedModel, batch: int, context: int) -> float:
        """Tokens per second if a step only reads the weights and the cache, or only multiplies."""
        config = model.config
        cache = batch * context * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        reading = (2 * num_weights(model) + cache) / self.bytes_per_second
        return batch / max(reading, 2 * num_weights(model) * batch / self.flops_per_second)

    def prefill(self, model: PreTrainedModel) -> float:
        """Tokens per second if the linear layers' arithmetic were all; the last layer sees few tokens."""
        head = model.config.vocab_size * model.config.hidden_size
        return self.flops_per_second / (2 * (num_weights(model) - head))


def num_weights(model: PreTrainedModel) -> int:
    """Weights that a step multiplies by: all but an embedding that is only looked up."""
    total = sum(parameter.numel() for parameter in model.parameters())
    tied = model.config.tie_word_embeddings
    return total if tied else total - model.config.vocab_size * model.config.hidden_size


def measure_roofline(device: torch.device, *, quick: bool) -> Roofline:
    num_bytes, size = (2**24, 256) if quick else (2**32, 8192)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = best_of(lambda: target.copy_(source), device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = best_of(lambda: a @ b, device)
    return Roofline(2 * num_bytes / copying, 2 * size**3 / product)


def best_of(function: Callable[[], Any], device: torch.device, rounds: int = 10) -> float:
    """Seconds of the quickest of some calls."""
    times = []
    for _ in range(rounds + 2):
        synchronise(device)
        started = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times[2:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Competitor:
    """Prefill and decode rates of one system; fresh prompts each time."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.calls = 0

    def generate(self, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        """Seconds until every sequence has its first token, and until all have their last."""
        raise NotImplementedError

    def rates(self, batch: int, length: int, num_tokens: int) -> tuple[float, float]:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        prompts = torch.randint(3, self.vocab_size, (batch, length), generator=generator).tolist()
        first, total = self.generate(prompts, num_tokens)
        return batch * length / first, batch * (num_tokens - 1) / (total - first)


class Hearth(Competitor):
    def __init__(self, model: PreTrainedModel, batch: int, context: int) -> None:
        super().__init__(model.config.vocab_size)
        self.engine = Engine.from_model(
            model, max_num_seqs=batch, max_model_len=context, max_num_batched_tokens=8192, prefix_cache=False
        )

    def generate(self, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        started = time.perf_counter()
        for i, prompt in enumerate(prompts):
            self.engine.add_request(f"{self.calls}-{i}", prompt, params)
        seen: set[str] = set()
        first = 0.0
        while self.engine.has_work:
            seen.update(output.request_id for output in self.engine.step())
            if not first and len(seen) == len(prompts):
                first = time.perf_counter() - started
        return first, time.perf_counter() - started

    def close(self) -> None:
        self.engine.close()


class Transformers(Competitor):
    """`generate_batch`: transformers' own paged continuous batching."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model.config.vocab_size)
        self.model = model

    def generate(self, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
        config = GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0,
            eos_token_id=-1,
        )  # fmt: skip
        outputs = self.model.generate_batch(
            prompts, generation_config=config, record_timestamps=True, persistent_manager=True
        ).values()
        assert all(len(output.generated_tokens) == num_tokens for output in outputs)
        started = min(output.created_time for output in outputs)
        return (
            max(output.timestamps[0] for output in outputs) - started,
            max(output.timestamps[-1] for output in outputs) - started,
        )

    def close(self) -> None:
        destroy = getattr(self.model, "destroy_cached_continuous_batching_manager", None)
        if destroy is not None:
            destroy()


def measure(
    competitor: Competitor, batch: int, length: int, num_tokens: int, rounds: int
) -> dict[str, list[float]]:
    """{"prefill": [...], "decode": [...]}; a first round warms up."""
    rates = [competitor.rates(batch, length, num_tokens) for _ in range(rounds + 1)][1:]
    return {"prefill": [prefill for prefill, _ in rates], "decode": [decode for _, decode in rates]}


def table(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: medians in tokens per second, and ours over each of the others."""
    lines = [
        "| tok/s | hearth | generate_batch | roofline | hearth / generate_batch | hearth / roofline |",
        "|---|---|---|---|---|---|",
    ]
    for label, row in rows.items():
        median = {name: statistics.median(values) for name, values in row.items()}
        ours, peer, bound = (median.get(name) for name in ("hearth", "generate_batch", "roofline"))
        assert ours is not None
        cells = [f"{x:.0f}" if x else "-" for x in (ours, peer, bound)]
        cells += [f"{ours / x:.2f} x" if x else "-" for x in (peer, bound)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_shape(
    shape: str,
    batches: Sequence[int],
    roofline: Roofline,
    device: torch.device,
    arguments: argparse.Namespace,
) -> dict[str, dict[str, list[float]]]:
    """Rows of the table. One system at a time has the memory, the other is gone."""
    length, num_tokens, rounds = arguments.prompt_length, arguments.num_tokens, arguments.rounds
    context = length + num_tokens
    rows: dict[str, dict[str, list[float]]] = {}
    for batch in batches:
        model = make_model(shape, device)
        bounds = {
            "prefill": roofline.prefill(model),
            "decode": roofline.decode(model, batch, length + num_tokens // 2),
        }
        results = {}
        hearth = Hearth(model, batch, context)
        print(f"{shape}, batch {batch}: {hearth.engine.model_info['attention']} attention, "
              f"{'CUDA graphs' if hearth.engine.runner.graphs else 'no CUDA graphs'}")  # fmt: skip
        results["hearth"] = measure(hearth, batch, length, num_tokens, rounds)
        hearth.close()
        del hearth, model
        release(device)
        if not arguments.alone:
            peer = Transformers(make_model(shape, device))
            results["generate_batch"] = measure(peer, batch, length, num_tokens, rounds)
            peer.close()
            del peer
            release(device)
        for what in ("prefill", "decode"):
            row = {name: result[what] for name, result in results.items()}
            rows[f"{shape} {what}, batch {batch}"] = {**row, "roofline": [bounds[what]]}
    return rows


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and short runs, on any device")
    parser.add_argument("--shapes", nargs="+", choices=["1B", "8B"], default=["1B", "8B"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--num-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.batches = ["tiny"], [1, 4]
        arguments.prompt_length, arguments.num_tokens, arguments.rounds = 24, 8, 1
        # On a CPU generate_batch would take a third of the machine's memory for its cache.
        arguments.alone = arguments.alone or not torch.cuda.is_available()
    elif not torch.cuda.is_available():
        print("skipped: torch sees no GPU (a smoke test on the CPU: --quick)")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = hardware()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine["cpu"]
    roofline = measure_roofline(device, quick=arguments.quick)
    print(f"{name}, torch {torch.__version__}: {roofline.bytes_per_second / 1e9:.0f} GB/s copying, "
          f"{roofline.flops_per_second / 1e12:.1f} TFLOP/s in bf16 products")  # fmt: skip
    rows: dict[str, dict[str, list[float]]] = {}
    for shape in arguments.shapes:
        rows.update(run_shape(shape, arguments.batches, roofline, device, arguments))
    print("\n" + table(rows))
    results = {label: {name: summary(values) for name, values in row.items()} for label, row in rows.items()}
    stored = write_result(
        "engine_gpu-quick" if arguments.quick else "engine_gpu",
        results,
        settings={**vars(arguments), "device": name, "roofline": dataclasses.asdict(roofline)},
        machine=machine,
    )
    print(f"\nwritten to {os.path.relpath(stored)}")


if __name__ == "__main__":
    main()
