"""From the logits of a step to the tokens that its sequences gain.

Drafts are verified by sampling: at each position the ordinary sampler draws the token, with penalties, seed
and all; while it equals the draft the next position counts too, and at the first difference the drawn token
is kept and the rest dropped. A draft that is one certain token, as all of Hearth's are, is thereby accepted
with its own probability, and otherwise replaced by a draw from the others (speculative sampling, arXiv
2211.17192, for a draft distribution of one point): the output has the same distribution, and with a seed it
is the same output.

Legend: R positions that want logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hearth.engine.outputs import TokenLogprob
from hearth.engine.plan import Plan
from hearth.engine.request import Request
from hearth.engine.sampler import sample
from hearth.engine.sequences import Sequence


@dataclass
class Chosen:
    """What a step gave to one sequence."""

    sequence: Sequence
    num_drafts: int
    num_accepted: int = 0
    error: str | None = None  # why there was nothing to choose from


@dataclass
class _Cursor:
    chosen: Chosen
    position: int  # row of the logits
    draft_ids: tuple[int, ...]


@torch.inference_mode()
def choose(plan: Plan, logits_RV: torch.Tensor, sequence_of: Callable[[Request], Sequence]) -> list[Chosen]:
    """Append tokens to every sequence of ``plan`` that samples; may change ``logits_RV`` in place."""
    cursors, first = [], 0
    for row in plan.rows:
        if row.samples:
            chosen = Chosen(sequence_of(row.request), row.num_drafts)
            drafts = row.token_ids[row.num_tokens - row.num_drafts :]
            cursors.append(_Cursor(chosen, first + row.num_logits - 1 - row.num_drafts, drafts))
        first += row.num_logits
    result = [cursor.chosen for cursor in cursors]
    while cursors:
        cursors = _round(cursors, logits_RV)
    return result


def _round(cursors: list[_Cursor], logits_RV: torch.Tensor) -> list[_Cursor]:
    """Draw one token for each cursor; returns those whose draft was right and that go on."""
    rows = [cursor.position for cursor in cursors]
    part_RV = logits_RV if rows == list(range(len(logits_RV))) else logits_RV[rows]
    sampled = sample(part_RV, [cursor.chosen.sequence.sampling for cursor in cursors])
    going = []
    for cursor, is_sound, token_id, logprob in zip(
        cursors, sampled.is_sound, sampled.token_ids, sampled.logprobs, strict=True
    ):
        chosen = cursor.chosen
        grammar = chosen.sequence.sampling.grammar
        if not is_sound:
            chosen.error = "the model computed NaN or infinite logits for this request"
        elif grammar is not None and grammar.error is not None:
            chosen.error = grammar.error
        elif _advance(cursor, token_id, logprob):
            going.append(cursor)
    return going


def _advance(cursor: _Cursor, token_id: int, logprob: TokenLogprob | None) -> bool:
    reason = cursor.chosen.sequence.append(token_id, logprob)
    accepted = bool(cursor.draft_ids) and cursor.draft_ids[0] == token_id
    cursor.chosen.num_accepted += accepted
    cursor.draft_ids = cursor.draft_ids[1:]
    cursor.position += 1
    return accepted and reason is None
