"""Continuous batching under one token budget: which tokens of which sequences the next step computes.

No tensors, no clock, no randomness: the same calls give the same plans. There are no phases either; each
step a sequence computes some of its uncomputed tokens, whether they are a prompt, a chunk of one, the token
sampled last, drafts, or what a preemption threw away.

Order is by rank: priority, then arrival, with the bound of `hearth.engine.fairness`. It decides who is
admitted, who computes first, and, from its end, who loses its blocks when the pool is full.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

from hearth.engine.fairness import WaitingLine, rank_of
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.pool import BlockPool
from hearth.engine.request import Request, RequestState
from hearth.engine.swap import Costs, swapping_is_cheaper

# While some sequences decode, a step computes at most this part of its budget for prompts: they wait for the
# whole step, and a batch of a few hundred tokens uses a processor as well as one of thousands. Below the
# minimum it would not: reading the weights would take longer than computing.
PROMPT_PART = 8
MIN_PROMPT_TOKENS = 64


class Scheduler:
    """Owns the waiting and running sequences.

    costs, block_bytes: what copying a block to the host pool and computing a token cost, for the choice
        between them.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        costs: Costs | None = None,
        block_bytes: int = 0,
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prompt_tokens = max(max_num_batched_tokens // PROMPT_PART, MIN_PROMPT_TOKENS)
        self.costs = costs or Costs()
        self.block_bytes = block_bytes
        self.waiting = WaitingLine()
        self.running: list[Request] = []  # in order of rank
        self.num_preemptions = 0
        self.max_num_scores = max_num_batched_tokens  # of them, those that want logits of the prompt
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def requests(self) -> list[Request]:
        return [*self.running, *self.waiting]

    def add(self, request: Request) -> None:
        """Queue a sequence that was checked to fit: prompt and output within the whole pool."""
        worst_case = request.num_prompt_tokens + request.max_new_tokens
        assert self.pool.blocks_for(worst_case) <= self.pool.num_blocks, (
            "admitted a sequence that can never fit"
        )
        assert request.state is RequestState.WAITING
        request.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.push(request)

    def schedule(self) -> Plan:
        """Plan the next step, and count its tokens as computed.

        Decodes come first, so that a long prompt never starves them; then the chunks of prompts under way
        and new sequences, unless this step had to take blocks from somebody of their rank. An empty plan
        means no work.
        """
        self.pool.begin_step()
        step = _Step(self)
        self._displace(step)
        decoding = [request for request in self.running if request.is_decoding]
        prompts = [request for request in self.running if not request.is_decoding]
        step.draft_budget = step.budget - len(decoding)
        for request in decoding:
            if request.state is RequestState.RUNNING and step.budget:
                step.decode(request)
        if step.rows:
            step.budget = min(step.budget, self.max_prompt_tokens)
        for request in prompts:
            if request.state is RequestState.RUNNING:
                self._admit(step, before=request)
                num_tokens = min(request.num_uncomputed, step.room(request))
                if num_tokens:
                    step.extend(request, num_tokens)
        self._admit(step)
        assert step.rows or not self.has_work, "there is work, but nothing was planned"
        return Plan(tuple(step.rows), tuple(step.preempted), *self.pool.take_copies())

    def _displace(self, step: _Step) -> None:
        """Make room for the head of the line, if it has a better priority than sequences that run.

        The worst ones lose their places, and only if that suffices; one waiting sequence a step bounds the
        unrest. Those displaced cannot displace in turn, as their priority is worse.
        """
        if not self.waiting or not self.running or not _yields(self.running[-1], self.waiting.head):
            return
        head = self.waiting.head
        found = self.pool.find(head)
        num_tokens = min(len(head.tokens), len(found) * self.pool.block_size + step.budget)
        missing = self.pool.num_missing(found, num_tokens)
        available = self.pool.num_available
        if len(self.running) < self.max_num_seqs and missing + len(self.running) <= available:
            return
        owners: Counter[int] = Counter()
        victims: list[Request] = []
        for victim in reversed(self.running):
            if not _yields(victim, head):
                return
            victims.append(victim)
            available += self.pool.count_released(victim, owners)
            if available >= missing:
                break
        if available < missing:
            return
        for victim in victims:
            step.preempt(victim)
        step.reserve(head, missing)

    def _admit(self, step: _Step, *, before: Request | None = None) -> None:
        """Let waiting sequences in; with ``before``, only those of a better priority than that one."""
        while self.waiting and step.budget and len(self.running) < self.max_num_seqs:
            request = self.waiting.head
            if (before is not None and not _yields(before, request)) or step.is_blocked(request):
                return
            found = self.pool.find(request)
            start = len(found) * self.pool.block_size
            num_tokens = min(len(request.tokens) - start, step.room(request))
            if not num_tokens:
                step.block(request)
                return
            # Room for one more block per running sequence: admitting must not preempt in the next steps.
            keep = 0 if request is step.reserved_for else len(self.running)
            if self.pool.num_missing(found, start + num_tokens) + keep > self.pool.num_available:
                step.block(request)
                return
            self.pool.begin(request, found)
            self.pool.slide(request)
            grown = self.pool.grow(request, start + num_tokens)
            assert grown
            self.waiting.admit()
            step.reserve(None, 0)
            request.state = RequestState.RUNNING
            insort(self.running, request, key=rank_of)
            self.pool.query_tokens += len(request.tokens)
            self.pool.hit_tokens += start
            if request.num_preemptions == 0:
                request.num_cached = start
            step.add(request, num_tokens)

    def preempt(self, request: Request) -> None:
        """Take the blocks of a running sequence; when its turn comes again it computes them anew, or copies
        those back that were overwritten meanwhile, if that was found cheaper."""
        num_lost = self.pool.count_lost(request) if self.pool.host is not None else 0
        if num_lost and swapping_is_cheaper(
            num_lost * self.block_bytes, num_lost * self.pool.block_size, self.costs
        ):
            self.pool.want(request)
        self.pool.release(request)
        request.draft_ids.clear()
        self._stop_running(request)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push(request)

    def _stop_running(self, request: Request) -> None:
        index = bisect_left(self.running, request.rank, key=rank_of)
        assert self.running[index] is request
        del self.running[index]

    def settle(self, request: Request) -> None:
        """Take note that a row that samples was executed and its new tokens were appended.

        The last of them is not computed yet; what was computed beyond it, for drafts that were wrong, is void
        and will be overwritten.
        """
        request.draft_ids.clear()
        request.num_computed = len(request.tokens) - 1
        self.pool.trim(request)
        self.pool.commit(request)  # of drafts that were right; the windows may pass them next

    def finish(self, request: Request, reason: str) -> None:
        """End a sequence, running or waiting, and free its blocks."""
        assert request.state is not RequestState.FINISHED
        if request.state is RequestState.RUNNING:
            self.pool.release(request)
            self._stop_running(request)
        else:
            self.pool.unwant(request)
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def fail_step(self, plan: Plan, reason: str = "error") -> None:
        """End every sequence of a plan whose execution failed; what it may have half written is forgotten."""
        block_size = self.pool.block_size
        self.pool.forget(block_id for _, block_id in plan.swap_in)
        if self.pool.host is not None:
            self.pool.host.forget(slot for _, slot in plan.swap_out)
        for row in plan.rows:
            self.pool.forget(row.block_ids[row.start // block_size :])
            self.finish(row.request, reason)

    def check(self) -> None:
        """Assert the invariants of scheduler and pool."""
        self.pool.check(self.running)
        if self.pool.host is not None:
            self.pool.host.check(r.block_hashes[: r.num_wanted] for r in self.waiting)
        self.waiting.check()
        assert len(self.running) <= self.max_num_seqs
        assert all(r.state is RequestState.RUNNING for r in self.running)
        assert all(r.state is RequestState.WAITING for r in self.waiting)
        ranks = [r.rank for r in self.running]
        assert ranks == sorted(set(ranks))
        for request in self.waiting:
            assert not request.block_ids
            assert not request.draft_ids
            assert request.num_computed == 0
        for request in self.running:
            assert not request.num_wanted
            assert request.num_computed <= len(request.tokens) + len(request.draft_ids)
            assert not request.draft_ids or request.num_computed >= len(request.tokens) - 1
            assert self.pool.blocks_for(request.num_computed) <= len(request.block_ids)
            assert len(request.block_ids) <= self.pool.blocks_for(
                len(request.tokens) + len(request.draft_ids)
            )


def _yields(running: Request, waiting: Request) -> bool:
    """Whether a running sequence may lose its place to a waiting one."""
    return running.params.priority > waiting.params.priority and not running.is_promoted


class _Step:
    """A plan in the making."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.pool = scheduler.pool
        self.budget = scheduler.max_num_batched_tokens
        self.draft_budget = 0
        self.score_budget = scheduler.max_num_scores
        self.rows: list[PlanRow] = []
        self.planned: set[Request] = set()
        self.preempted: list[Request] = []
        self.reserved_for: Request | None = None  # a waiting sequence for which others were displaced
        self.num_reserved = 0
        self._blocked: tuple[bool, int, int] | None = None  # nobody of this rank or a worse one is admitted

    def room(self, request: Request) -> int:
        """Tokens of this sequence that the step can take."""
        return min(self.budget, self.score_budget) if request.wants_scores else self.budget

    def reserve(self, request: Request | None, num_blocks: int) -> None:
        self.reserved_for, self.num_reserved = request, num_blocks

    def block(self, request: Request) -> None:
        """Admit nobody in this step who would overtake ``request``, which got no blocks."""
        self._blocked = request.rank if self._blocked is None else min(self._blocked, request.rank)

    def is_blocked(self, request: Request) -> bool:
        # A sequence that was preempted in this step may have been promoted since.
        return self._blocked is not None and (request.rank >= self._blocked or request in self.preempted)

    def preempt(self, victim: Request) -> None:
        self.scheduler.preempt(victim)
        self.preempted.append(victim)
        self.block(victim)

    def add(self, request: Request, num_tokens: int) -> None:
        assert 0 < num_tokens <= self.budget
        start = request.num_computed
        end = request.num_computed = start + num_tokens
        length = len(request.tokens)
        num_drafts = max(0, end - length)
        samples = end >= length and request.pooling is None
        num_logits = 1 + num_drafts if samples else 0
        if request.wants_scores:
            num_logits = max(num_logits, end - max(start, request.num_scored))
            self.score_budget -= num_tokens
        token_ids = tuple(request.tokens[start:end])
        if num_drafts:
            token_ids += tuple(request.draft_ids[:num_drafts])
        if request.block_table is None:
            request.block_table = request.make_table()
        self.rows.append(
            PlanRow(
                request,
                start,
                num_tokens,
                token_ids,
                request.block_table,
                num_logits,
                samples,
                num_drafts,
            )
        )
        self.planned.add(request)
        self.budget -= num_tokens
        # Blocks may be found by others from now on: within a step, keys and values of all rows are written
        # before any are read. Should the step fail, `fail_step` forgets them.
        self.pool.commit(request)

    def decode(self, request: Request) -> None:
        """One token, and as many of its drafts as need nobody else's tokens or blocks."""
        drafts = request.draft_ids
        if drafts:
            room = request.max_new_tokens - request.num_output_tokens - 1
            del drafts[max(0, min(len(drafts), self.draft_budget, room)) :]
            keep = max(self.num_reserved, len(self.scheduler.running))
            if not self.pool.grow(request, len(request.tokens) + len(drafts), keep=keep):
                drafts.clear()
            self.draft_budget -= len(drafts)
        self.extend(request, 1 + len(drafts))

    def extend(self, request: Request, num_tokens: int) -> None:
        """Continue a running sequence, at the cost of the worst ones if there are no blocks."""
        self.pool.slide(request)
        keep = 0
        if self.reserved_for is not None and request.rank > self.reserved_for.rank:
            keep = self.num_reserved
        while not self.pool.grow(request, request.num_computed + num_tokens, keep=keep):
            victim = self._victim(request)
            if victim is None:
                self.block(request)
                request.draft_ids.clear()
                self.pool.trim(request)
                return
            self.preempt(victim)
        self.add(request, num_tokens)

    def _victim(self, request: Request) -> Request | None:
        """The worst sequence that is not in the plan yet, if it is worse than ``request``.

        Otherwise ``request`` waits a step: something is planned and will finish or preempt it, or a better
        sequence comes later in this step and takes what it needs. The best sequence of all can always grow
        in the end, because admission made sure that it fits into an empty pool.
        """
        for running in reversed(self.scheduler.running):
            if running is request:
                return None
            if running not in self.planned:
                return running
        return None
