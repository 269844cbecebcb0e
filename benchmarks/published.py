"""Training runs that others have published, and what the planner says of them.

    python benchmarks/published.py            # the table of docs/planner.md; seconds, nothing is trained

Nothing is fitted to a row. What differs from Hearth is stated as each report has it: what torchtitan and
Megatron share, gather, recompute and overlap. What no report states is the same for all rows of a source, and
written beside it here. Figures of torchtitan and Megatron-Bridge were read from their repositories; those of
the papers were compared with what others copied from them, as named beside each. Rates of matrix products, of
attention and of memory are those of the planner.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import AutoConfig

from hearth.parallel.layout import Layout
from hearth.parallel.planner.facts import ModelFacts, facts_of_config
from hearth.parallel.planner.hardware import GIB, Cluster, find_device, make_cluster
from hearth.parallel.planner.job import Job
from hearth.parallel.planner.memory import Plan, memory_of
from hearth.parallel.planner.step import Step, step_time


@dataclass(frozen=True)
class Row:
    """A published run. ``tokens``: a second and device; ``tflops``: a device, as the source counts them."""

    source: str
    name: str
    facts: ModelFacts
    job: Job
    plan: Plan
    cluster: Cluster
    tokens: float | None = None
    tflops: float | None = None
    seconds: float | None = None
    gib: float | None = None
    count: Callable[[Step], float] | None = None  # FLOPs of a step, as the source counts them


def llama(hidden: int, inner: int, layers: int, heads: int) -> ModelFacts:
    """A Llama 3.1."""
    return facts_of_config(
        AutoConfig.for_model(
            "llama",
            vocab_size=128256,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        )
    )


def gpt(hidden: int, layers: int, heads: int) -> ModelFacts:
    """A GPT with Megatron's vocabulary and 2,048 positions."""
    return facts_of_config(
        AutoConfig.for_model(
            "gpt2", n_embd=hidden, n_layer=layers, n_head=heads, n_positions=2048, vocab_size=51200
        )
    )


def torchtitan() -> list[Row]:
    """torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (December 2024), tables 1 to 6.

    Their H100 has 96 GB of HBM2e at 2.4 TB/s and runs at 500 of 700 W; its rates are taken to fall in
    proportion. torchtitan gathers bfloat16, makes all logits at once, divides the vocabulary by tensor
    parallelism, keeps every second product under selective checkpointing, shares state over context, too,
    keeps gathered weights under a pipeline (ZeRO 2) and cuts a batch into as many micro-batches as there are
    stages. Memory is what its allocator reserved. Asynchronous tensor parallelism hides half of its sums.
    """
    power = 500 / 700
    usual = find_device("h100")
    device = replace(
        usual,
        name="H100 96 GB, 500 W",
        memory=96 * 10**9,
        matmul=power * usual.matmul,
        fp8_matmul=power * (usual.fp8_matmul or 0.0),
        bandwidth=2.4e12,
    )
    ways: dict[str, Any] = {
        "gathers_bf16": True,
        "chunked_loss": False,
        "vocabulary_split": True,
        "isolated": False,
        "alternate_products": True,
        "context_always_shares": True,
    }
    small, middle, large = (
        llama(4096, 14336, 32, 32),
        llama(8192, 28672, 80, 64),
        llama(16384, 53248, 126, 128),
    )
    fp8 = {"compiled": True, "precision": "fp8"}
    found: list[Row] = []

    def add(
        name: str, facts: ModelFacts, layout: Layout, local: int, length: int, tokens: float, gib: float,
        chunks: int = 1, **settings: Any,
    ) -> None:  # fmt: skip
        pieces = layout.pipeline * chunks
        micro = local // pieces if layout.pipeline > 1 else local
        job = Job(length, local * layout.batch_ranks, max(1, micro), **{**ways, **settings})
        plan = Plan(
            layout,
            zero=2 if layout.pipeline > 1 else 3,
            sequence=layout.tensor > 1,
            schedule="interleaved" if chunks > 1 else "1f1b",
            chunks=chunks,
        )
        cluster = make_cluster(layout.world_size, gpu=device)
        found.append(Row("torchtitan", name, facts, job, plan, cluster, tokens=tokens, gib=gib))

    for devices, figures in (
        (8, (5762, 82.4, 6667, 77.0, 8532, 76.8)),
        (128, (5605, 67.0, 6514, 62.0, 8380, 61.8)),
    ):
        layout, sac = Layout(shard=devices), {"checkpointing": "selective"}
        add(f"8B, {devices} GPUs", small, layout, 2, 8192, figures[0], figures[1], **sac)
        add(f"8B, {devices}, compile", small, layout, 2, 8192, figures[2], figures[3], **sac, compiled=True)
        add(f"8B, {devices}, fp8", small, layout, 2, 8192, figures[4], figures[5], **sac, **fp8)
    full = {"checkpointing": "full", **fp8}
    for context, tokens, gib in ((1, 3890, 83.9), (2, 2540, 84.2), (4, 1071, 84.0), (8, 548, 84.5)):
        layout = Layout(shard=8 // context, context=context)
        add(
            f"8B, 8, {32 * context}k, context {context}",
            small,
            layout,
            1,
            32768 * context,
            tokens,
            gib,
            **full,
        )
    layout = Layout(shard=32, tensor=8)
    add("70B, 256, tensor 8", middle, layout, 16, 8192, 829, 71.9, **full)
    add("70B, 256, async tensor 8", middle, layout, 16, 8192, 876, 67.6, **full, tensor_overlap=0.5)
    full["tensor_overlap"] = 0.5
    layout = Layout(shard=8, tensor=8, pipeline=8)
    add("405B, 512, 1F1B", large, layout, 32, 8192, 100, 82.5, **full)
    add("405B, 512, interleaved", large, layout, 32, 8192, 128, 72.7, chunks=2, **full)
    for context, tokens, gib in ((1, 76, 75.3), (2, 47, 75.9), (4, 31, 77.1), (8, 16, 84.9)):
        layout = Layout(shard=8 // context, tensor=8, pipeline=8, context=context)
        name = f"405B, 512, {32 * context}k, context {context}"
        add(name, large, layout, 8, 32768 * context, tokens, gib, **full)
    return found


_MEGATRON: dict[str, Any] = {
    "bf16_state": True,
    "vocabulary_split": True,
    "isolated": False,
    "compiled": True,
    "chunked_loss": False,
}


def bridge() -> list[Row]:
    """Megatron-Bridge, docs/performance-summary.md, container 25.11, DGX H100, fp8, rows of 8,192 tokens.

    Optimizer state is shared over replicas; half of the sums of tensor parallelism are hidden.
    """
    ways = {**_MEGATRON, "precision": "fp8", "tensor_overlap": 0.5}
    found = []
    for name, facts, batch, layout, chunks, mode, tokens in (
        ("8B, 8 GPUs", llama(4096, 14336, 32, 32), 128, Layout(shard=8), 1, "selective", 14451),
        ("70B, 64", llama(8192, 28672, 80, 64), 128, Layout(shard=2, tensor=4, pipeline=8), 5, "none", 1602),
        (
            "405B, 1024",
            llama(16384, 53248, 126, 128),
            512,
            Layout(shard=8, tensor=8, pipeline=8, context=2),
            8,
            "none",
            292,
        ),
    ):
        schedule = "interleaved" if chunks > 1 else "1f1b"
        plan = Plan(layout, 1, layout.tensor > 1, schedule, chunks)
        job = Job(8192, batch, 1, checkpointing=mode, **ways)  # type: ignore[arg-type]
        cluster = make_cluster(layout.world_size)
        found.append(Row("Megatron-Bridge", name, facts, job, plan, cluster, tokens=float(tokens)))
    return found


def llama3() -> list[Row]:
    """Llama Team 2024, "The Llama 3 herd of models", table 4: 405B on H100 over RoCE; 16 M tokens a step.

    Groups and speeds as G. Lockwood quotes them from Meta's talk at SC'24 (glennklockwood.com, llama-3.1).
    Stages of one layer, 8 in each process, as 126 layers, embedding and output over 16 processes give.
    """
    facts, found = llama(16384, 53248, 126, 128), []
    ways = {**_MEGATRON, "tensor_overlap": 0.5}
    for length, layout, rows, tflops in (
        (8192, Layout(shard=64, tensor=8, pipeline=16), 32, 430),
        (8192, Layout(shard=128, tensor=8, pipeline=16), 16, 400),
        (131072, Layout(shard=8, tensor=8, pipeline=16, context=16), 16, 380),
    ):
        job = Job(length, rows * layout.batch_ranks, 1, **ways)
        plan = Plan(layout, 1, True, "interleaved", 7)
        name = f"405B, {layout.world_size}, {length // 1024}k"
        cluster = make_cluster(layout.world_size, interconnect="nvlink+roce")
        found.append(
            Row(
                "Llama 3", name, facts, job, plan, cluster, tflops=tflops, count=lambda step: step.model_flops
            )
        )
    return found


def korthikanti() -> list[Row]:
    """Korthikanti et al. 2022, table 5, "present work": A100, rows of 2,048, sequence parallelism, selective.

    Times and groups as Calculon has them for its own validation (calculon-ai/calculon, llm/validation.py).
    Their selective recomputation runs the scores of attention again, which is what attention without
    FlashAttention costs in memory traffic; here attention is counted over whole rows. Nothing is overlapped.
    """
    found = []
    for name, shape, pipeline, chunks, batch, micro, seconds in (
        ("22B, 8 GPUs", (6144, 48, 64), 1, 1, 4, 4, 1.10),
        ("175B, 64", (12288, 96, 96), 8, 3, 64, 1, 13.75),
        ("530B, 280", (20480, 105, 128), 35, 3, 280, 1, 37.83),
        ("1T, 512", (25600, 128, 160), 64, 1, 512, 1, 71.49),
    ):
        layout = Layout(tensor=8, pipeline=pipeline)
        plan = Plan(layout, 3, True, "interleaved" if chunks > 1 else "1f1b", chunks)
        job = Job(2048, batch, micro, eager_attention=True, **_MEGATRON)
        cluster = make_cluster(layout.world_size, gpu="a100")
        found.append(Row("Korthikanti", name, gpt(*shape), job, plan, cluster, seconds=seconds))
    return found


def narayanan() -> list[Row]:
    """Narayanan et al. 2021, table 1: A100, rows of 2,048, everything recomputed; FLOPs by their equation 3.

    All columns as MLCarbon has them (SotaroKaneda/MLCarbon, data/megatron_table.csv). Neither the size of the
    micro-batch nor the number of stages in each process is in the table: one row, and the fewest that make
    their interleaved schedule. Nothing is overlapped.
    """
    found = []
    for name, hidden, layers, heads, tensor, pipeline, devices, batch, tflops in (
        ("1.7B, 32 GPUs", 2304, 24, 24, 1, 1, 32, 512, 137),
        ("3.6B, 64", 3072, 30, 32, 2, 1, 64, 512, 138),
        ("7.5B, 128", 4096, 36, 32, 4, 1, 128, 512, 142),
        ("18.4B, 256", 6144, 40, 48, 8, 1, 256, 1024, 135),
        ("39.1B, 512", 8192, 48, 64, 8, 2, 512, 1536, 138),
        ("76.1B, 1024", 10240, 60, 80, 8, 4, 1024, 1792, 140),
        ("145.6B, 1536", 12288, 80, 96, 8, 8, 1536, 2304, 148),
        ("310.1B, 1920", 16384, 96, 128, 8, 16, 1920, 2160, 155),
        ("529.6B, 2520", 20480, 105, 128, 8, 35, 2520, 2520, 163),
        ("1008B, 3072", 25600, 128, 160, 8, 64, 3072, 3072, 163),
    ):
        layout = Layout(data=devices // tensor // pipeline, tensor=tensor, pipeline=pipeline)
        plan = Plan(layout)
        if pipeline > 1:
            each = layers // pipeline
            chunks = next(number for number in range(2, each + 1) if each % number == 0)
            plan = Plan(layout, schedule="interleaved", chunks=chunks)
        flops = 96 * batch * 2048 * layers * hidden**2
        flops *= 1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden)
        job = Job(2048, batch, 1, checkpointing="full", eager_attention=True, **_MEGATRON)
        cluster = make_cluster(devices, gpu="a100")
        found.append(
            Row(
                "Narayanan",
                name,
                gpt(hidden, layers, heads),
                job,
                plan,
                cluster,
                tflops=tflops,
                count=lambda _step, flops=flops: flops,  # type: ignore[misc]
            )
        )
    return found


def all_rows() -> list[Row]:
    """Every row of every source."""
    return [*torchtitan(), *bridge(), *llama3(), *korthikanti(), *narayanan()]


def compare(row: Row) -> dict[str, Any]:
    """Predicted beside published; errors as shares, above zero where the planner promises too much."""
    step = step_time(row.facts, row.job, row.plan, row.cluster)
    devices = row.plan.layout.world_size
    if row.tokens is not None:
        unit, said, published = "tokens/s", step.tokens_per_second / devices, row.tokens
    elif row.tflops is not None:
        assert row.count is not None
        unit, said, published = "TFLOP/s", row.count(step) / step.seconds / devices / 1e12, row.tflops
    else:
        assert row.seconds is not None
        unit, said, published = "s", step.seconds, row.seconds
    speed = published / said - 1 if unit == "s" else said / published - 1
    found = {
        "source": row.source,
        "name": row.name,
        "unit": unit,
        "predicted": said,
        "published": published,
        "speed_error": speed,
    }
    if row.gib is not None:
        memory = memory_of(row.facts, row.job, row.plan).total / GIB
        found |= {"gib": memory, "published_gib": row.gib, "memory_error": memory / row.gib - 1}
    return found


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, and the medians."""
    lines = ["| source | run | predicted | published | speed | GiB | published | memory |", "|---" * 8 + "|"]
    for found in results:
        memory = "| | | |"
        if "gib" in found:
            memory = f"| {found['gib']:.1f} | {found['published_gib']:.1f} | {found['memory_error']:+.0%} |"
        lines.append(
            f"| {found['source']} | {found['name']} | {found['predicted']:.4g} {found['unit']} "
            f"| {found['published']:.4g} | {found['speed_error']:+.0%} {memory}"
        )
    for what in ("speed", "memory"):
        errors = [abs(found[f"{what}_error"]) for found in results if f"{what}_error" in found]
        lines.append(
            f"\n{what}: median error {statistics.median(errors):.0%}, largest {max(errors):.0%}, "
            f"{len(errors)} runs"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or with --json the figures."""
    results = [compare(row) for row in all_rows()]
    print(json.dumps(results, indent=1) if "--json" in sys.argv else table(results))


if __name__ == "__main__":
    main()
