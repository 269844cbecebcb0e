"""Speculation as the engine sees it: before a step, propose; after it, learn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from hearth.engine.choose import Chosen
from hearth.engine.draft.drafter import Drafter, grant
from hearth.engine.draft.gate import Gate
from hearth.engine.plan import Plan
from hearth.engine.request import Request
from hearth.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Speculator:
    """A drafter, and the gate that keeps it from costing more than it gains."""

    def __init__(
        self,
        drafter: Drafter,
        scheduler: Scheduler,
        *,
        num_draft_tokens: int,
        num_valid: Callable[[Request], int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``num_valid``: of a request's drafts, how many its grammar would allow. ``clock``: seconds."""
        self.drafter = drafter
        self.scheduler = scheduler
        self.num_draft_tokens = num_draft_tokens
        self.num_valid = num_valid
        self.clock = clock
        self.gate = Gate()
        self.is_broken = False
        self.num_drafts = self.num_tokens = self.num_accepted = 0
        self._started = 0.0
        self._usual = True

    def propose(self) -> None:
        """Fill the ``draft_ids`` of running sequences, if drafts pay at present.

        A drafter that fails is not asked again: its faults cost speed, never a request.
        """
        self._started, self._usual = self.clock(), True
        running = self.scheduler.running
        self._withdraw(running)
        num_decoding = sum(request.is_decoding for request in running)
        if self.is_broken or not num_decoding or not self.gate.wants_drafts(num_decoding):
            return
        scheduler = self.scheduler
        allowance = grant(running, scheduler.pool, scheduler.max_num_batched_tokens, self.num_draft_tokens)
        try:
            self._usual = self.drafter.propose(allowance, running)
        except Exception as error:
            logger.error("drafting failed and is switched off", exc_info=error)
            self.is_broken = True
            self._withdraw(running)
            return
        for request in allowance:
            if request.draft_ids:
                del request.draft_ids[self.num_valid(request) :]

    def _withdraw(self, running: Sequence[Request]) -> None:
        """Take back drafts that no step has verified."""
        for request in running:
            if request.draft_ids:
                request.draft_ids.clear()
                self.scheduler.pool.trim(request)

    def observe(self, plan: Plan, chosen: Sequence[Chosen]) -> None:
        """Learn from an executed step."""
        num_drafts = 0
        for each in chosen:
            num_drafts += each.num_drafts
            self.num_drafts += each.num_drafts > 0
            self.num_accepted += each.num_accepted
            self.drafter.observe(each.sequence.request, each.num_drafts, each.num_accepted)
        self.num_tokens += num_drafts
        is_pure = all(row.samples and row.num_tokens == row.num_drafts + 1 for row in plan.rows)
        if not is_pure or not self._usual:
            return  # the step did other work too, which says nothing about drafts
        self.gate.record(
            len(chosen),
            drafted=num_drafts > 0,
            tokens=len(chosen) + sum(each.num_accepted for each in chosen),
            seconds=self.clock() - self._started,
        )
