"""Continuous batching under one token budget: which tokens of which sequences the next step computes.

No tensors, no clock, no randomness: the same calls give the same plans. There are no phases either; each
step a sequence computes some of its uncomputed tokens, whether they are a prompt, a chunk of one, the token
sampled last, or what a preemption threw away.
"""

from __future__ import annotations

from collections import deque

from hearth.engine.plan import Plan, PlanRow
from hearth.engine.pool import BlockPool
from hearth.engine.request import Request, RequestState


class Scheduler:
    """Owns the waiting and running sequences, first come first served."""

    def __init__(self, pool: BlockPool, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self.num_preemptions = 0
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
        self.waiting.append(request)

    def schedule(self) -> Plan:
        """Plan the next step, and count its tokens as computed.

        Decodes come first, so that a long prompt never starves them; then the chunks of prompts under way,
        oldest first; then new sequences, unless this step had to preempt. An empty plan means no work.
        """
        step = _Step(self)
        # A token or a few each; two passes instead of a sort keep both groups in order of arrival.
        for decoding in (True, False):
            for request in list(self.running):
                if request.state is RequestState.RUNNING and request.is_decoding is decoding:
                    step.continue_running(request)
        if not step.preempted and not step.starved:
            self._admit(step)
        assert step.rows or not self.has_work, "there is work, but nothing was planned"
        return Plan(tuple(step.rows), tuple(step.preempted))

    def _admit(self, step: _Step) -> None:
        while self.waiting and step.budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            num_matched = self.pool.match(request)
            num_tokens = min(request.num_uncomputed, step.budget)
            # Room for one more block per running sequence: admitting must not preempt in the next steps.
            keep = len(self.running)
            if not self.pool.grow(request, request.num_computed + num_tokens, keep=keep):
                self.pool.release(request)
                break
            self.waiting.popleft()
            request.state = RequestState.RUNNING
            self.running.append(request)
            self.running.sort(key=lambda r: r.arrival)
            self.pool.query_tokens += len(request.tokens)
            self.pool.hit_tokens += num_matched
            if request.num_preemptions == 0:
                request.num_cached = num_matched
            step.add(request, num_tokens)

    def preempt(self, request: Request) -> None:
        """Take the blocks of a running sequence; it recomputes them when its turn comes again."""
        self.pool.release(request)
        request.draft_ids.clear()
        self.running.remove(request)
        request.state = RequestState.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        position = next(
            (i for i, r in enumerate(self.waiting) if r.arrival > request.arrival), len(self.waiting)
        )
        self.waiting.insert(position, request)

    def settle(self, request: Request) -> None:
        """Take note that a row that samples was executed and its new tokens were appended.

        The last of them is not computed yet; what was computed beyond it, for drafts that were wrong, is void
        and will be overwritten.
        """
        request.draft_ids.clear()
        request.num_computed = len(request.tokens) - 1
        self.pool.trim(request)

    def finish(self, request: Request, reason: str) -> None:
        """End a sequence, running or waiting, and free its blocks."""
        assert request.state is not RequestState.FINISHED
        self.pool.release(request)
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def fail_step(self, plan: Plan, reason: str = "error") -> None:
        """End every sequence of a plan whose execution failed; what it may have half written is forgotten."""
        block_size = self.pool.block_size
        for row in plan.rows:
            self.pool.forget(row.block_ids[row.start // block_size :])
            self.finish(row.request, reason)

    def check(self) -> None:
        """Assert the invariants of scheduler and pool."""
        self.pool.check(self.running)
        assert len(self.running) <= self.max_num_seqs
        assert all(r.state is RequestState.RUNNING for r in self.running)
        assert all(r.state is RequestState.WAITING for r in self.waiting)
        arrivals = [r.arrival for r in self.running]
        assert arrivals == sorted(arrivals)
        waiting = [r.arrival for r in self.waiting]
        assert waiting == sorted(waiting)
        for request in self.waiting:
            assert not request.block_ids
            assert request.num_computed == 0
        for request in self.running:
            assert request.num_computed <= len(request.tokens)
            assert not request.draft_ids or request.is_decoding
            assert self.pool.blocks_for(request.num_computed) <= len(request.block_ids)
            assert len(request.block_ids) <= self.pool.blocks_for(
                len(request.tokens) + len(request.draft_ids)
            )


class _Step:
    """A plan in the making."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.budget = scheduler.max_num_batched_tokens
        self.rows: list[PlanRow] = []
        self.planned: set[tuple[str, int]] = set()
        self.preempted: list[Request] = []
        self.starved = False  # a running sequence got no blocks

    def add(self, request: Request, num_tokens: int) -> None:
        assert 0 < num_tokens <= self.budget
        start = request.num_computed
        end = request.num_computed = start + num_tokens
        num_drafts = max(0, end - len(request.tokens))
        samples = end >= len(request.tokens)
        self.rows.append(
            PlanRow(
                request=request,
                start=start,
                num_tokens=num_tokens,
                token_ids=(*request.tokens[start:end], *request.draft_ids[:num_drafts]),
                block_ids=tuple(request.block_ids),
                num_logits=1 + num_drafts if samples else 0,
                samples=samples,
                num_drafts=num_drafts,
            )
        )
        self.planned.add(request.key)
        self.budget -= num_tokens
        # Blocks may be found by others from now on: within a step, keys and values of all rows are written
        # before any are read. Should the step fail, `fail_step` forgets them.
        self.scheduler.pool.commit(request)

    def continue_running(self, request: Request) -> None:
        num_tokens = min(request.num_uncomputed, self.budget)
        if num_tokens == 0:
            return
        while not self.scheduler.pool.grow(request, request.num_computed + num_tokens):
            victim = self._victim(request)
            if victim is None:
                self.starved = True
                return
            self.scheduler.preempt(victim)
            self.preempted.append(victim)
        self.add(request, num_tokens)

    def _victim(self, request: Request) -> Request | None:
        """The youngest sequence that is not in the plan yet, if it is younger than ``request``.

        Otherwise ``request`` waits a step: something is planned and will finish or preempt it, or an older
        sequence comes later in this step and takes what it needs. The oldest sequence of all can always
        grow in the end, because admission made sure that it fits into an empty pool.
        """
        unplanned = [r for r in self.scheduler.running if r.key not in self.planned]
        return unplanned[-1] if unplanned[-1] is not request else None
