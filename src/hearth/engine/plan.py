"""What one step computes: immutable plain integers, so that every rank could run the same plan."""

from __future__ import annotations

from dataclasses import dataclass

from hearth.engine.request import Request


@dataclass(frozen=True)
class PlanRow:
    """Compute tokens ``start … start + num_tokens - 1`` of one sequence.

    block_ids: the blocks of the sequence at plan time, enough for ``start + num_tokens`` tokens.
    samples: whether the last of these tokens is the sequence's last, so that its logits are wanted.
    """

    request: Request
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Plan:
    """The rows of one step, decodes first. ``preempted``: the sequences that lost their blocks for it."""

    rows: tuple[PlanRow, ...]
    preempted: tuple[Request, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def sampled(self) -> tuple[Request, ...]:
        """The sequences that get a token from this step, in the order of the logits."""
        return tuple(row.request for row in self.rows if row.samples)

    def __bool__(self) -> bool:
        return bool(self.rows)
