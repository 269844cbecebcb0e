"""Throughput of the data pipeline in MB/s of text by stage, and of the pack plan.

    python benchmarks/data.py [SOURCE]

SOURCE is a path as in a recipe; the default is the PEPs of ../shared/data, and without them the standard
library. Each number of workers is measured in turns; medians over three rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import RESULTS, hardware, versions

from hearth.config import Recipe
from hearth.data import PackedRows, PackPlan, prepare_dataset
from hearth.data.workers import num_cores

ROUNDS = 3
PEPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "peps" / "peps.jsonl.gz"


def measure_prepare(source: str) -> dict[str, dict[str, float]]:
    """Median MB/s of each stage, by number of workers; bytes are those of the uncompressed text."""
    speeds: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for num_workers in sorted({1, num_cores()}):
            recipe = Recipe.model_validate(
                {
                    "data": {"sources": [{"path": source}], "num_workers": num_workers},
                    "tokenizer": {"vocab_size": 8192},
                }
            )
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                dataset = prepare_dataset(recipe, Path(folder) / "dataset")
                seconds = time.perf_counter() - began
                num_bytes = sum(split.bytes for split in dataset.manifest.splits.values())
                stages = speeds.setdefault(f"{num_workers} workers", {})
                for stage, (_, stage_seconds) in dataset.timings.items():
                    stages.setdefault(stage, []).append(num_bytes / 1e6 / stage_seconds)
                stages.setdefault("all", []).append(num_bytes / 1e6 / seconds)
                if num_workers == 1:
                    rows = PackedRows(dataset.split("train"), 512)
                    began = time.perf_counter()
                    for index in range(min(1000, len(rows))):
                        rows[index]
                    per_second = min(1000, len(rows)) / (time.perf_counter() - began)
                    stages.setdefault("rows of 512 a second", []).append(per_second)
    return {
        workers: {stage: round(statistics.median(values), 1) for stage, values in stages.items()}
        for workers, stages in speeds.items()
    }


def measure_plan() -> dict[str, dict[str, float]]:
    """Seconds and padding of the plan for a million documents of log-normal length."""
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000).astype(np.int64) + 2
    found = {}
    for sequence_length in (512, 2048, 8192):
        began = time.perf_counter()
        plan = PackPlan.build(lengths, sequence_length)
        seconds = time.perf_counter() - began
        found[f"1M documents, rows of {sequence_length}"] = {
            "seconds": round(seconds, 3),
            "padding": round(plan.padding, 6),
        }
    return found


def main() -> None:
    """Measure, print, and write ``results/data.json``."""
    source = sys.argv[1] if len(sys.argv) > 1 else str(PEPS) if PEPS.exists() else "stdlib"
    result = {
        "hardware": hardware(),
        "versions": versions(),
        "source": Path(source).name,
        "mb_per_s": measure_prepare(source),
        "plan": measure_plan(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "data.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
