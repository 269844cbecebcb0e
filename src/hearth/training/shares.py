"""Work that is dealt out to the processes of a world, where all must run the model equally often."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

from hearth.parallel.world import World

Item = TypeVar("Item")


def own_turns(world: World, items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Of items that are dealt out in turns those of this process, and whether each counts.

    Every process has equally many: one that comes away empty in the last turn gets the first item of that
    turn, which another has, too, and which does not count here.
    """
    ranks, own = world.layout.batch_ranks, world.layout.batch_rank(world.rank)
    given = iter(items)
    while turn := list(itertools.islice(given, ranks)):
        counts = own < len(turn)
        yield turn[own if counts else 0], counts


def own_range(world: World, num: int) -> range:
    """Of ``num`` things a part for each process, of almost equal sizes; the first processes have more."""
    each, rest = divmod(num, world.size)
    first = world.rank * each + min(world.rank, rest)
    return range(first, first + each + (world.rank < rest))
