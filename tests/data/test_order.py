"""The order of the rows is a bijection for every key, and differs between keys."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hearth.data.order import consumed_row_index, row_index


@given(seed=st.integers(-(2**63), 2**63), epoch=st.integers(0, 1000), num_rows=st.integers(1, 700))
def test_every_epoch_visits_every_row_once(seed: int, epoch: int, num_rows: int) -> None:
    visited = [row_index(seed, epoch, position, num_rows) for position in range(num_rows)]
    assert sorted(visited) == list(range(num_rows))


@given(position=st.integers(0, 10**12 - 1), epoch=st.integers(0, 10))
def test_huge_orders_stay_in_range_without_memory(position: int, epoch: int) -> None:
    assert 0 <= row_index(7, epoch, position, 10**12) < 10**12


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = {
        tuple(row_index(seed, epoch, position, 100) for position in range(100))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_the_order_is_fixed_for_all_time() -> None:
    """A changed order would silently break the exact resume of runs that are under way."""
    assert [row_index(0, 0, position, 10) for position in range(10)] == [7, 8, 2, 0, 3, 1, 4, 5, 6, 9]


def test_rows_are_spread_evenly() -> None:
    """Mean displacement of a random permutation of n is n / 3; a shift or a reversal is far from it."""
    n = 5000
    moved = sum(abs(row_index(3, 0, position, n) - position) for position in range(n)) / n
    assert 0.95 * n / 3 < moved < 1.05 * n / 3


def test_consumed_rows_go_on_across_epochs() -> None:
    straight = [consumed_row_index(1, consumed, 7) for consumed in range(21)]
    assert [sorted(straight[first : first + 7]) for first in (0, 7, 14)] == [list(range(7))] * 3
    assert straight[7:14] == [row_index(1, 1, position, 7) for position in range(7)]
