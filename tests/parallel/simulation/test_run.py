"""Long runs with failures beside the closed forms, and how they must change."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearth.parallel.simulation.formulas import best_interval, expected_goodput, expected_slowest
from hearth.parallel.simulation.run import (
    DAY,
    HOUR,
    LLAMA3_MTBF,
    Faults,
    Outcome,
    Saves,
    simulate,
    simulate_many,
)

STEADY = Faults(device_mtbf=2000 * HOUR, detect_seconds=60, restart_seconds=240, deviation=0.0)


def long_run(every: float | None, *, rounds: int = 8, num_devices: int = 1000, **changes: Any) -> Outcome:
    """Two months of ten-second steps on devices that fail every two hours, saving in a minute."""
    settings: dict[str, Any] = {
        "step_seconds": 10.0,
        "num_steps": 60_000,
        "num_devices": num_devices,
        "faults": STEADY,
        "saves": Saves(bytes=60e9, stall_bandwidth=1e9, load_bandwidth=1e9, every=every),
    }
    return simulate_many(rounds=rounds, **{**settings, **changes})


@pytest.mark.parametrize("every", [300.0, 900.0, 3000.0])
def test_goodput_is_that_of_dalys_formula(every: float) -> None:
    mtbf = STEADY.device_mtbf / 1000
    said = expected_goodput(every, 60.0, 60.0 + 60 + 240, mtbf)
    assert long_run(every).goodput == pytest.approx(said, rel=0.015)


def test_the_best_interval_is_dalys() -> None:
    mtbf = STEADY.device_mtbf / 1000
    best = best_interval(60.0, mtbf)
    assert best == pytest.approx(math.sqrt(2 * 60 * mtbf) - 60, rel=0.06)  # Young's, to the first order
    there = long_run(best).goodput
    assert there > long_run(best / 4).goodput + 0.02
    assert there > long_run(best * 4).goodput + 0.02
    assert long_run(None).goodput == pytest.approx(there, abs=0.002)


def test_no_failures_lose_nothing() -> None:
    calm = Faults(device_mtbf=1e30, deviation=0.0)
    outcome = long_run(600.0, rounds=1, faults=calm)
    assert outcome.failures == 0
    assert outcome.goodput == pytest.approx(600 / 660, rel=1e-3)


def test_llama_3_has_as_many_failures_as_it_had() -> None:
    # 54 days on 16,384 GPUs: 419 unexpected interruptions, and more than 90 % of the time was effective.
    saves = Saves(bytes=16 * 405e9, stall_bandwidth=1e12, load_bandwidth=2e12)
    outcome = simulate_many(
        rounds=20,
        step_seconds=10.0,
        num_steps=int(54 * DAY / 10 * 0.93),
        num_devices=16_384,
        faults=Faults(deviation=0.0),
        saves=saves,
    )
    assert outcome.failures / outcome.seconds * 54 * DAY == pytest.approx(419, rel=0.05)
    assert 0.9 < outcome.goodput < 0.99
    assert pytest.approx(54 * DAY * 16_384 / 419) == LLAMA3_MTBF


def test_the_slowest_of_many() -> None:
    assert expected_slowest(1, 0.1) == 1.0
    assert expected_slowest(1000, 0.1) == pytest.approx(1.324, abs=0.002)  # 3.241 deviations (Harter 1961)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), devices=st.sampled_from([8, 1024, 16384]), every=st.floats(60, 1e4))
def test_time_is_all_accounted_for_and_a_seed_repeats(seed: int, devices: int, every: float) -> None:
    run: dict[str, Any] = {
        "step_seconds": 10.0,
        "num_steps": 500,
        "num_devices": devices,
        "faults": Faults(device_mtbf=4000 * HOUR),
        "saves": Saves(bytes=1e12, stall_bandwidth=1e11, load_bandwidth=1e11, every=every),
    }
    outcome = simulate(**run, seed=seed)
    assert sum(outcome.shares().values()) == pytest.approx(1.0)
    assert all(share >= -1e-9 for share in outcome.shares().values())
    assert simulate(**run, seed=seed) == outcome


def test_more_devices_lose_more() -> None:
    shares = [long_run(None, num_devices=size, rounds=4).goodput for size in (8, 128, 1024, 8192)]
    assert shares == sorted(shares, reverse=True)


def test_a_run_that_gets_nowhere_ends() -> None:
    outcome = simulate(
        step_seconds=10.0,
        num_steps=10,
        num_devices=1_000_000,
        faults=Faults(device_mtbf=1e6),
        saves=Saves(bytes=1e12, stall_bandwidth=1e12, load_bandwidth=1e12),
    )
    assert outcome.goodput < 0.01
