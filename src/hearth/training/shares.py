"""Work that is dealt out to the processes of a world, where all must run the model equally often."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from hearth.errors import HearthError, TrainingError
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


def in_every_process(world: World, function: Callable[[], Item]) -> list[Item]:
    """What ``function`` returns in each process, by rank, in all; where it raises in one, all raise.

    ``function`` must not wait for the others.
    """
    if world.size == 1:
        return [function()]
    result: Item | None = None
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:  # noqa: BLE001 - told to all, and raised again
        error = raised
    # Errors of other packages may not be what another process can read.
    told = error if error is None or isinstance(error, HearthError) else _told(world, error)
    found: list[tuple[Item, Exception | None]] = world.gather((result, told))  # type: ignore[arg-type]
    first = next((each for _, each in found if each is not None), None)
    if first is not None:
        raise error or first
    return [each for each, _ in found]


def _told(world: World, error: Exception) -> TrainingError:
    return TrainingError(f"process {world.rank}: {type(error).__name__}: {error}")
