"""The pipeline by events beside the formulas of its bubble."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearth.parallel.planner.schedules import bubble_share, in_flight
from hearth.parallel.simulation.pipeline import Pass, order_1f1b, order_interleaved, run_orders


def orders_of(stages: int, chunks: int, micro_batches: int) -> list[list[Pass]]:
    """The orders of all processes."""
    if chunks == 1:
        return [order_1f1b(rank, stages, micro_batches) for rank in range(stages)]
    return [order_interleaved(rank, stages, chunks, micro_batches) for rank in range(stages)]


@settings(deadline=None, max_examples=60)
@given(
    stages=st.integers(2, 6),
    chunks=st.integers(1, 3),
    rounds=st.integers(1, 4),
    forward=st.floats(0.5, 2.0),
    ratio=st.floats(1.0, 3.0),
)
def test_bubbles_are_those_of_the_formulas(
    stages: int, chunks: int, rounds: int, forward: float, ratio: float
) -> None:
    micro_batches = stages * rounds
    took = run_orders(
        orders_of(stages, chunks, micro_batches), forward=forward / chunks, backward=forward * ratio / chunks
    )
    work = micro_batches * forward * (1 + ratio)
    schedule = "1f1b" if chunks == 1 else "interleaved"
    said = bubble_share(schedule, stages=stages, chunks=chunks, micro_batches=micro_batches)  # type: ignore[arg-type]
    assert took == pytest.approx(work * (1 + said), rel=1e-9)


@pytest.mark.parametrize(("stages", "micro_batches"), [(4, 8), (4, 2), (8, 8)])
def test_activations_in_flight_of_1f1b(stages: int, micro_batches: int) -> None:
    for rank in range(stages):
        kept = most = 0
        for step in order_1f1b(rank, stages, micro_batches):
            kept += 1 if step.forward else -1
            most = max(most, kept)
        said = in_flight("1f1b", stage=rank, stages=stages, chunks=1, micro_batches=micro_batches)
        assert most == said
        assert kept == 0


@pytest.mark.parametrize("chunks", [2, 3])
def test_activations_in_flight_when_interleaved(chunks: int) -> None:
    for rank in range(4):
        kept = most = 0
        for step in order_interleaved(rank, 4, chunks, 16):
            kept += 1 if step.forward else -1
            most = max(most, kept)
        said = in_flight("interleaved", stage=rank, stages=4, chunks=chunks, micro_batches=16)
        assert most == pytest.approx(said * chunks)


def test_every_pass_is_run_once_and_transfers_cost() -> None:
    orders = orders_of(3, 2, 6)
    assert len({step for order in orders for step in order}) == 2 * 6 * 6
    quick = run_orders(orders, forward=1.0, backward=2.0)
    assert run_orders(orders, forward=1.0, backward=2.0, send=0.1) > quick


def test_a_slow_stage_sets_the_pace() -> None:
    orders = orders_of(4, 1, 32)
    even = run_orders(orders, forward=1.0, backward=2.0)
    uneven = run_orders(orders, forward=[1.0, 1.0, 1.0, 1.5], backward=[2.0, 2.0, 2.0, 3.0])
    assert uneven == pytest.approx(1.5 * even, rel=0.05)
