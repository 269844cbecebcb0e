"""Processes that write one checkpoint together: what they tell each other on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from hearth.errors import TrainingError

Result = TypeVar("Result")


class Together(Protocol):
    """Processes that all do the same, in the same order."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all, by rank, in all."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Its own value."""
        return [value]


class ByGroup:
    """The processes of a torch.distributed group, which nothing else may use at the same time."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        """Any picklable value."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found


def in_all(together: Together, function: Callable[[], Result]) -> list[Result]:
    """Run ``function`` in all processes; what it returned in each. Raises in all where it raised in one.

    ``function`` must not wait for the others.
    """
    if together.size == 1:
        return [function()]
    error: BaseException | None = None
    result: Any = None
    try:
        result = function()
    except Exception as raised:  # noqa: BLE001 - told to all, and raised again
        error = raised
    outcomes = together.gather((result, error if error is None else _told(error)))
    if error is not None:
        raise error
    for rank, (_, other) in enumerate(outcomes):
        if other is not None:
            other.add_note(f"in process {rank}")
            raise other
    return [result for result, _ in outcomes]


def _told(error: BaseException) -> BaseException:
    """What another process can read of an error: those of other packages may be made of anything."""
    if type(error).__module__.partition(".")[0] in ("builtins", "hearth"):
        return error
    return TrainingError(f"{type(error).__name__}: {error}")


def in_first(together: Together, function: Callable[[], Result]) -> Result:
    """Run ``function`` in the first process; its result in all. Raises in all where it raised."""
    return in_all(together, lambda: function() if together.rank == 0 else None)[0]  # type: ignore[return-value]
