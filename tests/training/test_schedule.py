"""Learning rates, by their own definition."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearth.training import learning_rate_at

SHAPES = ["cosine", "wsd", "linear", "constant"]


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


def test_wsd_stays_then_falls() -> None:
    at = [
        learning_rate_at(s, total_steps=100, peak=1.0, shape="wsd", min_ratio=0.0, decay_fraction=0.2)
        for s in range(100)
    ]
    assert set(at[:80]) == {1.0}
    falls = [first - second for first, second in itertools.pairwise(at[79:])]
    assert falls == pytest.approx([1 / 21] * 20)


@given(
    total=st.integers(1, 400),
    warmup=st.integers(0, 400),
    shape=st.sampled_from(SHAPES),
    ratio=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_always_between_zero_and_peak_and_never_rising_after_warmup(
    total: int, warmup: int, shape: str, ratio: float, decay: float
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
        )
        for step in range(total)
    ]
    assert all(0 <= rate <= 3.0 * (1 + 1e-12) for rate in rates)
    after = rates[max(0, warmup - 1) :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    assert all(rate >= 3.0 * ratio * (1 - 1e-9) for rate in rates[warmup:])
