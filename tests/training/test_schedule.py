"""Learning rates, by their own definition and by transformers'."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hearth.training import learning_rate_at

SHAPES = ["cosine", "wsd", "linear", "inverse_sqrt", "constant"]
DECAYS = ["linear", "sqrt", "cosine"]


@pytest.mark.parametrize("shape", SHAPES)
def test_warmup_is_linear_and_starts_above_zero(shape: str) -> None:
    rates = [learning_rate_at(s, total_steps=100, peak=1.0, shape=shape, warmup_steps=4) for s in range(5)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == pytest.approx(1.0, abs=0.02)


def test_cosine_by_hand() -> None:
    at = [learning_rate_at(s, total_steps=110, peak=2.0, warmup_steps=10, min_ratio=0.1) for s in range(110)]
    assert at[60] == pytest.approx(2.0 * 0.55)
    assert at[109] == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * 0.99))))


def test_linear_by_hand() -> None:
    assert learning_rate_at(50, total_steps=100, peak=1.0, shape="linear", min_ratio=0.0) == 0.5


def test_inverse_sqrt_by_hand() -> None:
    at = [
        learning_rate_at(s, total_steps=2000, peak=1.0, shape="inverse_sqrt", warmup_steps=10, min_ratio=0.1)
        for s in range(2000)
    ]
    assert at[40] == pytest.approx(0.5)
    assert at[90] == pytest.approx(1 / 3)
    assert at[1000:] == [0.1] * 1000


def wsd(decay_shape: str) -> list[float]:
    return [
        learning_rate_at(
            step,
            total_steps=100,
            peak=1.0,
            shape="wsd",
            min_ratio=0.0,
            decay_fraction=0.2,
            decay_shape=decay_shape,
        )
        for step in range(100)
    ]


def test_wsd_stays_then_falls() -> None:
    at = wsd("linear")
    assert set(at[:80]) == {1.0}
    falls = [first - second for first, second in itertools.pairwise(at[79:])]
    assert falls == pytest.approx([1 / 21] * 20)


def test_wsd_decay_shapes_by_hand() -> None:
    # Step 79 + k of 100 has gone k / 21 of the way; the run ends one step before the minimum.
    assert wsd("sqrt")[79:] == pytest.approx([1 - math.sqrt(k / 21) for k in range(21)])
    assert wsd("cosine")[79:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * k / 21) for k in range(21)])


def reference(make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]) -> list[float]:
    """Rates of a scheduler of transformers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(60):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("shape", ["linear", "cosine", "inverse_sqrt", "constant"])
def test_after_warmup_the_rates_are_those_of_transformers(shape: str) -> None:
    from transformers import optimization

    expected = reference(
        {
            "linear": lambda o: optimization.get_linear_schedule_with_warmup(o, 10, 60),
            "cosine": lambda o: optimization.get_cosine_schedule_with_warmup(o, 10, 60),
            "inverse_sqrt": lambda o: optimization.get_inverse_sqrt_schedule(o, 10),
            "constant": lambda o: optimization.get_constant_schedule_with_warmup(o, 10),
        }[shape]
    )
    ours = [
        learning_rate_at(s, total_steps=60, peak=1.0, shape=shape, warmup_steps=10, min_ratio=0.0)
        for s in range(60)
    ]
    assert ours[10:] == pytest.approx(expected[10:])
    assert ours[:9] == pytest.approx(expected[1:10])  # theirs waste the first step at a rate of zero


@given(
    total=st.integers(1, 400),
    warmup=st.integers(0, 400),
    shape=st.sampled_from(SHAPES),
    ratio=st.floats(0, 1),
    decay=st.floats(0, 1),
    decay_shape=st.sampled_from(DECAYS),
)
def test_always_between_zero_and_peak_and_never_rising_after_warmup(
    total: int, warmup: int, shape: str, ratio: float, decay: float, decay_shape: str
) -> None:
    warmup = min(warmup, total)
    rates = [
        learning_rate_at(
            step,
            total_steps=total,
            peak=3.0,
            shape=shape,
            warmup_steps=warmup,
            min_ratio=ratio,
            decay_fraction=decay,
            decay_shape=decay_shape,
        )
        for step in range(total)
    ]
    assert all(0 <= rate <= 3.0 * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == pytest.approx([3.0 * (step + 1) / max(1, warmup) for step in range(warmup)])
    after = rates[max(0, warmup - 1) :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    assert all(rate >= 3.0 * ratio * (1 - 1e-9) for rate in rates[warmup:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay_shape", DECAYS)
def test_no_jumps_and_the_minimum_at_the_end(shape: str, decay_shape: str) -> None:
    """Twice the steps, half the largest jump (1/√2 of it for a square root): the shapes are continuous."""

    def rates(total: int) -> list[float]:
        keys = {"shape": shape, "decay_shape": decay_shape, "min_ratio": 0.2, "warmup_steps": total // 10}
        return [learning_rate_at(s, total_steps=total, peak=1.0, **keys) for s in range(total)]

    largest = [
        max(abs(later - earlier) for earlier, later in itertools.pairwise(rates(total)))
        for total in (1000, 4000)
    ]
    assert largest[1] < largest[0] * 0.55
    if shape in ("cosine", "linear", "wsd"):
        assert rates(4000)[-1] == pytest.approx(0.2, abs=0.002)
