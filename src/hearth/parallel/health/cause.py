"""Which process of a group failed first, and of what. Pure.

One that dies takes the others with it: their connections break within milliseconds, and they may be gone
before the culprit has finished to complain. A process that only lost a connection is therefore not blamed
while another has something else to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LOST_CONNECTION = re.compile(
    r"connection reset by peer|connection closed by peer|broken pipe|connection refused|socketpoll"
    r"|remote process exited|connection was likely closed|heartbeat monitor|peer .*closed"
    r"|nccl(remote)?error|dist(network|backend|store)error|did not meet the others|lost a process in"
    r"|timed out waiting",
    re.IGNORECASE,
)
# Frames in which a process waits for the others: in a collective, or in a backward pass that contains one.
_WAITING = re.compile(r"[/\\]torch[/\\]distributed[/\\]|_engine_run_backward|in synchronize\b")
_TAIL_LINES = 20


@dataclass(frozen=True)
class Death:
    """The end of one process: when (any one clock), how, and the last lines it wrote."""

    rank: int
    at: float
    exit_code: int
    tail: str = ""

    @property
    def lost_connection(self) -> bool:
        """Whether its last words are that another process is gone."""
        return self.exit_code > 0 and _LOST_CONNECTION.search(self.tail) is not None


def first_death(deaths: Sequence[Death]) -> Death:
    """The one that the others followed."""
    assert deaths
    return min(deaths, key=lambda each: (each.lost_connection, each.at, each.rank))


def blame(
    hung: Sequence[int], stopped: Sequence[int], silent: Sequence[int], stacks: Mapping[int, str]
) -> list[int]:
    """Of ranks that hang, those that the others probably wait for; several where nothing tells them apart.

    A process that is stopped, or cannot even be asked for its stacks (``silent``), is what the others wait
    for; else one that is not itself waiting, by its stacks.
    """
    assert hung
    for known in (stopped, silent):
        if found := [rank for rank in known if rank in hung]:
            return found
    busy = [rank for rank in hung if not _WAITING.search(stacks.get(rank, ""))]
    return busy or list(hung)


def last_lines(text: str, num_lines: int = _TAIL_LINES) -> str:
    """The last lines that are not blank."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-num_lines:])
