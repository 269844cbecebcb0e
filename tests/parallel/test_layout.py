"""Layouts: arithmetic that must be right for every size."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.parallel.layout import DIMENSIONS, Layout

SIZES = st.integers(1, 4)


@given(SIZES, SIZES, SIZES, SIZES, SIZES)
def test_ranks_and_coordinates_are_one_to_one(
    data: int, shard: int, tensor: int, pipeline: int, context: int
) -> None:
    layout = Layout(data, shard, tensor, pipeline, context)
    seen = [tuple(layout.coordinates(rank)[name] for name in DIMENSIONS) for rank in range(layout.world_size)]
    assert seen == list(itertools.product(*(range(size) for size in layout.sizes)))
    shares = [layout.batch_rank(rank) for rank in range(layout.world_size)]
    each = layout.world_size // layout.batch_ranks
    assert sorted(shares) == sorted(list(range(layout.batch_ranks)) * each)


def test_data_is_what_is_left() -> None:
    assert Layout.of(ParallelSection(shard=2, tensor=2), 16) == Layout(4, 2, 2)
    assert Layout.of(ParallelSection(), 1) == Layout()


@pytest.mark.parametrize(
    ("section", "world_size", "message"),
    [
        (ParallelSection(shard=3), 4, "does not divide"),
        (ParallelSection(data=2, tensor=2), 8, "= 4 processes, but there are 8"),
        (ParallelSection(data=3, expert=2), 3, "parallel.expert 2 does not divide"),
    ],
)
def test_what_does_not_divide_is_refused(section: ParallelSection, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout.of(section, world_size)
