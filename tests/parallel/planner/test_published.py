"""Published runs: the planner's errors stay within the bounds that docs/planner.md states."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("published", BENCHMARKS / "published.py")
    assert spec is not None
    assert spec.loader is not None
    published = importlib.util.module_from_spec(spec)
    sys.modules["published"] = published  # dataclasses look their module up
    spec.loader.exec_module(published)
    return [published.compare(row) for row in published.all_rows()]


def errors(results: list[dict[str, Any]], what: str) -> list[float]:
    """Errors of the rows that have one."""
    return [found[what] for found in results if what in found]


def test_the_speed_of_all_runs(results: list[dict[str, Any]]) -> None:
    assert len(results) == 38
    assert statistics.median(abs(error) for error in errors(results, "speed_error")) <= 0.08
    ring = [found for found in results if found["source"] == "torchtitan" and "context" in found["name"]]
    others = [found for found in results if found not in ring]
    assert all(abs(error) <= 0.2 for error in errors(others, "speed_error"))
    # torchtitan's ring attention of 2024 fell further behind the longer the rows were.
    assert all(-0.1 <= error <= 0.6 for error in errors(ring, "speed_error"))


def test_the_memory_of_all_runs(results: list[dict[str, Any]]) -> None:
    found = errors(results, "memory_error")
    assert len(found) == 18
    assert statistics.median(abs(error) for error in found) <= 0.12
    assert all(-0.25 <= error <= 0.1 for error in found)
