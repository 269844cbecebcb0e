"""Work that is dealt out: everything is done once, and all do equally much."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hearth.errors import DataError
from hearth.parallel.layout import Layout
from hearth.parallel.world import World
from hearth.training.checkpoint.together import in_all
from hearth.training.shares import own_range, own_turns


def worlds(layout: Layout) -> list[World]:
    return [World(layout, torch.device("cpu"), rank) for rank in range(layout.world_size)]


@given(num=st.integers(0, 20), data=st.integers(1, 3), shard=st.integers(1, 3), tensor=st.integers(1, 2))
def test_turns_are_equally_many_and_each_item_counts_once(
    num: int, data: int, shard: int, tensor: int
) -> None:
    layout = Layout(data=data, shard=shard, tensor=tensor)
    turns = {world.rank: list(own_turns(world, range(num))) for world in worlds(layout)}
    assert {len(each) for each in turns.values()} == {-(-num // layout.batch_ranks)}
    counted = [item for each in turns.values() for item, counts in each if counts]
    assert sorted(counted) == sorted([*range(num)] * tensor), "processes of tensor do the same"


@given(num=st.integers(0, 40), size=st.integers(1, 9))
def test_ranges_are_of_almost_equal_sizes(num: int, size: int) -> None:
    ranges = [own_range(world, num) for world in worlds(Layout(data=size))]
    assert [item for each in ranges for item in each] == list(range(num))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
    assert len(ranges[0]) == max(map(len, ranges)), "the first one has some if anybody has"


def test_one_process_asks_nobody() -> None:
    alone = World.alone(torch.device("cpu"))
    assert in_all(alone, lambda: 3) == [3]
    with pytest.raises(DataError, match="as it is"):
        in_all(alone, lambda: (_ for _ in ()).throw(DataError("as it is")))
