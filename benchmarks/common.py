"""What every benchmark needs: the machine in words, versions, alternating measurements, a ratio table, JSON.

A benchmark measures its competitors in turns within one run, so that a busy machine hurts all alike, and
reports ratios of medians. Results go to ``benchmarks/results/NAME.json`` (not under version control).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hearth.telemetry.hardware import find_hardware

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "tokenizers", "numba", "numpy", "hearth-lm")


def hardware() -> dict[str, Any]:
    """What Hearth says about this machine, and how busy it was when the benchmark began."""
    return {**find_hardware().to_dict(), "load_average_at_start": os.getloadavg()[0]}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def names_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: names separated by commas, of those that there are; ``none`` for none of them."""

    def parse(text: str) -> list[str]:
        names = [] if text == "none" else text.split(",")
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; choose from {', '.join(allowed)}")
        return names

    return parse


def timed(function: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def alternate(functions: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Call each function ``rounds`` times in turns; what they returned, by name. The first round warms up."""
    results: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            value = function()
            if round_ > 0:
                results[name].append(value)
    return results


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def ratio_table(
    rows: Mapping[str, Mapping[str, Sequence[float]]], *, ours: str, unit: str, higher_is_better: bool = True
) -> str:
    """A Markdown table: a line a measurement, a column a competitor, and our ratio to the best other one."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| {unit} | {' | '.join(names)} | {ours} / best other |", "|---" * (len(names) + 2) + "|"]
    for label, row in rows.items():
        medians = {name: statistics.median(values) for name, values in row.items() if values}
        others = [value for name, value in medians.items() if name != ours]
        best = (max(others) if higher_is_better else min(others)) if others else None
        ratio = f"{medians[ours] / best:.2f} x" if best and ours in medians else "-"
        cells = [f"{medians[name]:.1f}" if name in medians else "-" for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def write_result(name: str, results: Any, *, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> Path:
    """Write ``results`` with hardware, versions and command to ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "benchmark": name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "hardware": dict(machine),
        "versions": versions(),
        "settings": dict(settings),
        "results": results,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)
    return path
