"""From the seconds of single measurements to shares and tables: pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

PLAIN, ALONE_PLAIN, ALONE = "plain DDP", "plain torch alone", "hearth alone"
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"data": 2},
    "ddp bf16": {"data": 2, "reduce": "bf16"},
    "ddp powersgd": {"data": 2, "reduce": "powersgd"},
    "zero1": {"shard": 2, "zero": 1},
    "zero2": {"shard": 2, "zero": 2},
    "fsdp": {"shard": 2},
    "tensor": {"tensor": 2},
    "1f1b": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "schedule": "interleaved", "stages": 2},
    "zero_bubble": {"pipeline": 2, "schedule": "zero_bubble", "stages": 2},
    "context": {"context": 2},
}
NAMES = (ALONE_PLAIN, ALONE, PLAIN, *LAYOUTS)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def scaling_table(size: str, facts: Mapping[str, Any]) -> str:
    """Rates, beside plain DDP and beside one process."""
    medians = {name: statistics.median(values) for name, values in facts["seconds"].items() if values}
    rows = []
    for name, seconds in medians.items():
        alone = medians.get(ALONE_PLAIN if name == PLAIN else ALONE)
        two = name not in (ALONE, ALONE_PLAIN)
        spread = [facts["tokens of a step"] / each for each in facts["seconds"][name]]
        loss = facts["losses"][name][-1]
        rows.append(
            [
                name,
                f"{facts['tokens of a step'] / seconds:.0f}",
                f"{min(spread):.0f} to {max(spread):.0f}",
                f"{medians[PLAIN] / seconds:.2f} x" if PLAIN in medians and two else "-",
                f"{alone / seconds / 2:.0%}" if alone and two else "-",
                f"{loss:.4f}",
            ]
        )
    head = (f"{size}, {facts['parameters'] / 1e6:.1f} M parameters", "tokens/s", "all steps")
    return table([*head, "/ plain DDP", "of twice 1 process", "last loss"], rows)


def overheads(seconds: Mapping[str, Sequence[float]], over: str) -> list[float]:
    """Percent that each step of ours takes longer than the same one of another loop."""
    return [100 * (ours / other - 1) for ours, other in zip(seconds["hearth"], seconds[over], strict=True)]


def overhead_table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The median, and where half of all steps lie."""
    rows = []
    for size, seconds in found.items():
        for over, text in (("plain", "plain DDP"), ("bare", "plain DDP around our loss")):
            shares = overheads(seconds, over)
            low, middle, high = statistics.quantiles(shares, n=4)
            rows.append([f"{size}, over {text}", f"{middle:+.1f} %", f"{low:+.1f} to {high:+.1f} %"])
    return table(["step of our trainer, ddp", "median", "half of the steps"], rows)


def idle_shares(ranks: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Medians over the rounds: the share of a step that each process does not spend in a pass."""
    groups: dict[tuple[str, int], list[list[float]]] = {}
    for passes in zip(*ranks, strict=True):
        key = (passes[0]["schedule"], passes[0]["num"])
        groups.setdefault(key, []).append([1 - each["busy"] / each["wall"] for each in passes])
    found = []
    for (schedule, num), rounds in groups.items():
        shares = [statistics.median(values) for values in zip(*rounds, strict=True)]
        found.append({"schedule": schedule, "micro_batches": num, "idle": shares, "rounds": rounds})
    return found


def bubble_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Beside the formula."""
    from hearth.parallel.pipeline import bubble

    rows = []
    for each in found:
        stages = 1 if each["schedule"] == "1f1b" else 2
        num = each["micro_batches"]
        said = bubble(each["schedule"], pipeline=2, stages=stages, num_micro_batches=num)
        idle = each["idle"]
        rows.append(
            [each["schedule"], str(num), f"{said:.1%}", f"{min(idle):.1%}"]
            + [f"{share:.1%}" for share in idle]
        )
    return table(["schedule", "micro-batches", "formula", "idle, busier process", "first", "last"], rows)


def checkpoint_table(facts: Mapping[str, Any]) -> str:
    """MiB/s, and as a share of what two plain processes reach."""
    mib = facts["bytes"] / 2**20
    medians = {name: statistics.median(values) for name, values in facts["seconds"].items()}
    rows = []
    for name, seconds in medians.items():
        disk = medians[f"disk, 2 processes: {name.rsplit(': ')[-1]}"]
        rows.append([name, f"{seconds:.2f}", f"{mib / seconds:.0f}", f"{disk / seconds:.2f} x"])
    return table([f"{mib:.0f} MiB of state", "s", "MiB/s", "/ disk, 2 processes"], rows)


def gpu_table(facts: Mapping[str, Any]) -> str:
    """Steps on one GPU, or that there is none."""
    if not facts:
        return table(["one GPU", "ms a step"], [["FSDP2 + compile beside plain torch", "not run: no GPU"]])
    medians = {name: statistics.median(values) for name, values in facts["seconds"].items()}
    rows = [
        [name, f"{1000 * seconds:.1f}", f"{seconds / medians['plain torch']:.3f} x"]
        for name, seconds in medians.items()
    ]
    how = "not compiled: " + facts["not compiled"] if facts["not compiled"] else "layers compiled"
    return table([f"one GPU, {how}", "ms a step", "/ plain torch"], rows)


def all_tables(found: Mapping[str, Any]) -> list[str]:
    """Those of all parts that ran."""
    parts = [scaling_table(size, facts) for size, facts in found.get("scaling", {}).items()]
    for name, make in (
        ("overhead", overhead_table),
        ("bubble", bubble_table),
        ("checkpoint", checkpoint_table),
        ("gpu", gpu_table),
    ):
        if name in found:
            parts.append(make(found[name]))
    return parts
