"""Drafts by a second, smaller model of the same vocabulary.

Its keys and values lie in blocks with the numbers that the sequence has in the main pool, in tensors of its
own. It computes only while drafting is on, so it is often behind: after a prompt, a preemption, a hit in the
prefix cache. What it has computed is known exactly, block by block; the rest it catches up on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from hearth.engine.plan import Plan, PlanRow
from hearth.engine.pool import BlockPool
from hearth.engine.request import Request
from hearth.engine.runner import Runner


class _Partial(NamedTuple):
    """Content of a block that is not full yet, and will have this hash."""

    block_hash: bytes


@dataclass(eq=False)
class _Progress:
    """How far the draft model is with one sequence."""

    num_preemptions: int
    num_computed: int = 0  # tokens of the sequence whose keys and values the draft model has
    num_named: int = 0  # leading blocks whose content has its hash as its name
    length: int = 0  # of the sequence when it last got drafts
    inputs: list[int] = field(default_factory=list)  # the drafts whose keys were computed then
    block_ids: list[int] = field(default_factory=list)


# The name of what a block of the draft model holds: the hash of its tokens and all before them, if it is full
# and the pool knows the hash; else whose it is.
_Content = bytes | _Partial | _Progress | None


class ModelDrafter:
    """A `Drafter` that lets ``runner`` continue the text greedily, all sequences at once."""

    def __init__(
        self, runner: Runner, pool: BlockPool, *, max_num_batched_tokens: int, max_model_len: int
    ) -> None:
        """``runner``: of the draft model, with the blocks of ``pool``. ``max_model_len``: its limit."""
        self.runner = runner
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self._progress: WeakKeyDictionary[Request, _Progress] = WeakKeyDictionary()
        self._content: list[_Content] = [None] * pool.num_blocks

    def observe(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """Nothing to remember: the next look at the tokens tells which drafts were right."""

    def propose(self, allowance: Mapping[Request, int], running: Sequence[Request]) -> bool:
        counts = {
            request: min(count, self.max_model_len - len(request.tokens))
            for request, count in allowance.items()
            if len(request.tokens) < self.max_model_len
        }
        rows, usual = self._catch_up_rows(counts, running)
        if not rows:
            return usual
        guesses = self._run(rows)
        ready = {row.request: guess for row, guess in zip(rows, guesses, strict=True) if row.samples}
        for request, guess in ready.items():
            request.draft_ids.append(guess)
        going = [request for request in ready if counts[request] > 1]
        while going:
            guesses = self._run([_draft_row(request) for request in going])
            for request, guess in zip(going, guesses, strict=True):
                self._progress[request].inputs.append(request.draft_ids[-1])
                request.draft_ids.append(guess)
            going = [request for request in going if len(request.draft_ids) < counts[request]]
        return usual

    def _catch_up_rows(
        self, counts: Mapping[Request, int], running: Sequence[Request]
    ) -> tuple[list[PlanRow], bool]:
        """What the sequences lack, within the budget of a step: first those that are to get drafts."""
        budget = self.max_num_batched_tokens
        rows, usual = [], True
        prompts = [r for r in running if r.pooling is None and not (r.is_decoding and r.num_output_tokens)]
        for request in [*counts, *prompts]:
            progress = self._sync(request)
            wanted = (
                len(request.tokens) if request in counts else min(request.num_computed, self.max_model_len)
            )
            num_tokens = min(wanted - progress.num_computed, budget)
            if num_tokens <= 0:  # nothing to do, or no budget left
                usual &= request not in counts
                continue
            start = progress.num_computed
            samples = request in counts and start + num_tokens == wanted
            if samples:
                fits = self.pool.grow(request, len(request.tokens) + counts[request])
                assert fits, "drafts were granted that have no blocks"
            rows.append(
                PlanRow(
                    request=request,
                    start=start,
                    num_tokens=num_tokens,
                    token_ids=tuple(request.tokens[start : start + num_tokens]),
                    block_ids=tuple(request.block_ids),
                    num_logits=int(samples),
                    samples=samples,
                )
            )
            budget -= num_tokens
            # After a step without drafts it lacks two or three tokens; more is catching up.
            usual &= samples and num_tokens <= 3
        return rows, usual

    def _sync(self, request: Request) -> _Progress:
        """What the draft model has of this sequence now, after what became of the last drafts and blocks."""
        assert not request.num_dropped, "blocks of a window were given up, which the draft model may not have"
        progress = self._progress.get(request)
        if progress is not None and progress.num_preemptions == request.num_preemptions:
            for draft, token in zip(progress.inputs, request.tokens[progress.length :], strict=False):
                if draft != token:
                    break
                progress.num_computed += 1
            progress.inputs.clear()
            num_blocks = self.pool.blocks_for(progress.num_computed)
            if progress.block_ids[:num_blocks] == request.block_ids[:num_blocks]:
                return progress
        progress = self._progress[request] = _Progress(request.num_preemptions)
        for block_id, block_hash in zip(request.block_ids, request.block_hashes, strict=False):
            if self._content[block_id] != block_hash:
                break
            progress.num_named += 1
        # The last token must be computed to have something to guess from.
        progress.num_computed = min(progress.num_named * self.pool.block_size, len(request.tokens) - 1)
        return progress

    @torch.inference_mode()
    def _run(self, rows: list[PlanRow]) -> list[int]:
        """Compute rows; the greedy next token for each (any, where a row samples nothing)."""
        logits_RV = self.runner.execute(Plan(tuple(rows)))
        chosen = iter(logits_RV.argmax(dim=-1).tolist())
        for row in rows:
            self._took(row)
        return [next(chosen) if row.samples else 0 for row in rows]

    def _took(self, row: PlanRow) -> None:
        """Write down what the blocks of a computed row hold now."""
        request, size = row.request, self.pool.block_size
        progress, hashes = self._progress[request], request.block_hashes
        is_draft = row.num_drafts > 0
        if not is_draft:
            progress.num_computed = row.end
            progress.length = len(request.tokens)
        progress.block_ids = request.block_ids[: self.pool.blocks_for(row.end)]
        for i in range(row.start // size, self.pool.blocks_for(row.end)):
            known = i < len(hashes) and not is_draft
            self._content[request.block_ids[i]] = _Partial(hashes[i]) if known else progress
        full = min(progress.num_computed // size, len(hashes))
        for i in range(progress.num_named, full):
            self._content[request.block_ids[i]] = hashes[i]
        progress.num_named = max(progress.num_named, full)

    def check(self, running: Sequence[Request]) -> None:
        """Assert that of no sequence a block would be read that does not hold its tokens."""
        for request in running:
            progress = self._sync(request)
            assert progress.num_computed < max(2, len(request.tokens))
            for i in range(self.pool.blocks_for(progress.num_computed)):
                content = self._content[request.block_ids[i]]
                hashes = request.block_hashes
                names = (hashes[i], _Partial(hashes[i])) if i < len(hashes) else ()
                assert content is progress or content in names, f"block {i} of {request.key} is not its own"


def _draft_row(request: Request) -> PlanRow:
    """Compute the last draft of ``request``, to guess what follows it."""
    start = len(request.tokens) + len(request.draft_ids) - 1
    return PlanRow(
        request=request,
        start=start,
        num_tokens=1,
        token_ids=(request.draft_ids[-1],),
        block_ids=tuple(request.block_ids),
        num_logits=1,
        samples=True,
        num_drafts=1,
    )
