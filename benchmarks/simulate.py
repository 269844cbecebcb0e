"""Goodput on 8 to 16,384 GPUs: where each kind of layout breaks. Nothing is trained.

    python benchmarks/simulate.py                       # minutes; tables on standard output
    python benchmarks/simulate.py --plots docs/images   # and the plots of docs/scale.md
    python benchmarks/simulate.py --quick               # two models on few sizes: seconds
    python benchmarks/simulate.py --bf16                # had weights been gathered in bfloat16

Models of Llama 3.1's shapes, steps of 16 M tokens in rows of 8,192 on nodes of eight H100 with NVLink and
InfiniBand. For each number of GPUs the planner's fastest layout of each kind trains for a month, five times,
with failures at the rate of Llama 3's report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import hardware, write_result
from transformers import AutoConfig

from hearth.parallel.planner import Job, facts_of_config, make_cluster
from hearth.parallel.planner.report import parallel_section
from hearth.parallel.simulation.plot import Panel, svg
from hearth.parallel.simulation.run import Faults
from hearth.parallel.simulation.study import KINDS, Point, study

SHAPES = {
    "1B": (2048, 8192, 16, 32),
    "8B": (4096, 14336, 32, 32),
    "70B": (8192, 28672, 80, 64),
    "405B": (16384, 53248, 126, 128),
}
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ROWS, LENGTH = 2048, 8192
SEED = 0


def run_model(name: str, sizes: Sequence[int], *, bf16: bool) -> dict[str, list[Point]]:
    """The study of one model. ``bf16``: weights are gathered in bfloat16, without autocast's copies."""
    hidden, inner, layers, heads = SHAPES[name]
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    job = Job(LENGTH, ROWS, 1, isolated=False, gathers_bf16=bf16)
    clusters = [make_cluster(size, interconnect="nvlink+ib") for size in sizes]
    return study(facts_of_config(config), job, clusters, faults=Faults(), seed=SEED)


def table(name: str, found: dict[str, list[Point]], sizes: Sequence[int]) -> str:
    """MFU and goodput by kind and size, and the fastest layout."""
    by_size: dict[int, dict[str, Point]] = {size: {} for size in sizes}
    for kind, points in found.items():
        for point in points:
            by_size[point.num_devices][kind] = point
    lines = [f"| {name}, GPUs | {' | '.join(KINDS)} | goodput | best |", "|---" * (len(KINDS) + 3) + "|"]
    for size, points in by_size.items():
        cells = [f"{points[kind].effective_mfu:.1%}" if kind in points else "-" for kind in KINDS]
        if not points:
            lines.append(f"| {size:,} | {' | '.join(cells)} | - | nothing fits |")
            continue
        best = max(points.values(), key=lambda point: point.effective_mfu)
        section = ", ".join(f"{key} {value}" for key, value in parallel_section(best.choice).items())
        lines.append(f"| {size:,} | {' | '.join(cells)} | {best.outcome.goodput:.1%} | {section} |")
    return "\n".join(lines)


def shares_panel(name: str, found: dict[str, list[Point]]) -> Panel:
    """Where the time of the best layouts goes that is not work."""
    best: dict[int, Point] = {}
    for points in found.values():
        for point in points:
            if point.num_devices not in best or point.effective_mfu > best[point.num_devices].effective_mfu:
                best[point.num_devices] = point
    lines: dict[str, list[tuple[int, float]]] = {}
    for size in sorted(best):
        for part, share in best[size].outcome.shares().items():
            if part != "useful":
                lines.setdefault(part, []).append((size, share))
    return Panel(f"{name}: time that is lost", lines, top=0.2)


def main() -> None:
    """Run the study; print tables, write plots."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    parser.add_argument("--quick", action="store_true", help="two models on few sizes")
    parser.add_argument("--bf16", action="store_true", help="as if weights were gathered in bfloat16")
    arguments = parser.parse_args()
    names = ["1B", "8B"] if arguments.quick else list(SHAPES)
    sizes = (8, 64, 512) if arguments.quick else SIZES
    results = {name: run_model(name, sizes, bf16=arguments.bf16) for name in names}
    for name, found in results.items():
        print(table(name, found, sizes), end="\n\n")
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        lines = {
            name: {kind: [(p.num_devices, p.effective_mfu) for p in found[kind]] for kind in KINDS}
            for name, found in results.items()
        }
        panels = [Panel(f"Llama of {name}", lines[name], top=0.6) for name in results]
        speed = svg("MFU over a month, failures and all, by kind of layout", panels)
        (arguments.plots / "scale-layouts.svg").write_text(speed, encoding="utf-8")
        losses = [shares_panel(name, found) for name, found in results.items()]
        lost = svg("Shares of the time that are no work, for the best layout", losses)
        (arguments.plots / "scale-losses.svg").write_text(lost, encoding="utf-8")
    figures = {
        name: {
            kind: [
                {"gpus": p.num_devices, "mfu": p.choice.step.mfu, **p.outcome.shares()} for p in found[kind]
            ]
            for kind in KINDS
        }
        for name, found in results.items()
    }
    path = write_result(
        "simulate",
        figures,
        settings={"rows": ROWS, "length": LENGTH, "bf16": arguments.bf16},
        machine=hardware(),
    )
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
