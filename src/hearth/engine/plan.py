"""What one step computes: immutable plain integers, so that every rank could run the same plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hearth.engine.request import Request

Copies = tuple[tuple[int, int], ...]


class PlanRow(NamedTuple):  # made for every sequence in every step: a third of the cost of a frozen dataclass
    """Compute tokens ``start … start + num_tokens - 1`` of one sequence.

    token_ids: the tokens; the last ``num_drafts`` of them are guesses that the step will verify.
    block_ids: the blocks of the sequence at plan time, enough for ``start + num_tokens`` tokens. Those that
        lie wholly before the window of every layer are gone; the first one left stands in their place.
    num_logits: how many of the last positions want logits: none; one to sample from; one and one more for
        every draft; or more, where the log-probabilities of the prompt are wanted.
    samples: whether the sequence's last token is among these, so that the step gives it at least one more.
    """

    request: Request
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    num_logits: int
    samples: bool
    num_drafts: int = 0

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True)
class Plan:
    """The rows of one step, decodes first.

    preempted: the sequences that lost their blocks for it.
    swap_out: (block, host slot) to copy before anything else; the blocks will be overwritten.
    swap_in: (host slot, block) to copy next, before the rows are computed, which read the blocks.
    """

    rows: tuple[PlanRow, ...]
    preempted: tuple[Request, ...] = ()
    swap_out: Copies = ()
    swap_in: Copies = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)
