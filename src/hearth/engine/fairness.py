"""Who goes first: by priority, then by arrival, with a bound on how long a sequence is passed over."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from hearth.engine.request import Request

# So many sequences may be admitted before the one that has waited longest is promoted over all others.
MAX_PASSES = 16


def rank_of(request: Request) -> tuple[bool, int, int]:
    return request.rank


class WaitingLine:
    """Waiting sequences in order of rank.

    After every ``MAX_PASSES`` admissions the sequence that arrived first is promoted: it is the next one, and
    only sequences that were promoted before it may take its blocks afterwards. So a sequence that finds m
    older ones waiting is admitted after at most ``(m + 1) * (MAX_PASSES + 1)`` admissions, whatever the
    priority of those that arrive later, and while strict order of priority is otherwise kept.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._num_passes = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def head(self) -> Request:
        return self._requests[0]

    def push(self, request: Request) -> None:
        insort(self._requests, request, key=rank_of)

    def remove(self, request: Request) -> None:
        index = bisect_left(self._requests, request.rank, key=rank_of)
        assert self._requests[index] is request
        del self._requests[index]

    def admit(self) -> Request:
        """Take the head; this may promote another one."""
        request = self._requests.pop(0)
        self._num_passes = self._num_passes + 1 if self._requests else 0
        if self._num_passes == MAX_PASSES:
            self._num_passes = 0
            self._promote(min(self._requests, key=lambda waiting: waiting.arrival))
        return request

    def _promote(self, request: Request) -> None:
        if not request.is_promoted and request is not self.head:
            self.remove(request)
            request.is_promoted = True
            self.push(request)

    def check(self) -> None:
        ranks = [request.rank for request in self._requests]
        assert ranks == sorted(set(ranks))
