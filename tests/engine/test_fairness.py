"""Who goes first, who gives way, and how long anybody can be kept waiting."""

from __future__ import annotations

import random

import pytest

from hearth.engine.fairness import MAX_PASSES, WaitingLine
from hearth.engine.params import SamplingParams
from hearth.engine.plan import Plan
from hearth.engine.pool import BlockPool
from hearth.engine.request import Request, RequestState
from hearth.engine.scheduler import MIN_PROMPT_TOKENS, PROMPT_PART, Scheduler


def make_scheduler(num_blocks: int = 100, seqs: int = 8, budget: int = 64, block_size: int = 4) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size), max_num_seqs=seqs, max_num_batched_tokens=budget)


def make_request(name: str, length: int, priority: int = 0, max_new: int = 4) -> Request:
    rng = random.Random(name)
    prompt = [rng.randrange(1000) for _ in range(length)]
    return Request(name, 0, prompt, SamplingParams(max_tokens=max_new, priority=priority), max_new)


def run(scheduler: Scheduler) -> Plan:
    """One step, in which every row that samples gains a token."""
    plan = scheduler.schedule()
    for row in plan.rows:
        if row.samples:
            request = row.request
            request.tokens.append(7)
            scheduler.settle(request)
            if request.num_output_tokens == request.max_new_tokens:
                scheduler.finish(request, "length")
    scheduler.check()
    return plan


def names(plan: Plan) -> list[str]:
    return [row.request.request_id for row in plan.rows]


def test_a_better_priority_goes_first_and_equals_in_the_order_of_arrival() -> None:
    scheduler = make_scheduler(seqs=2)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)):
        scheduler.add(make_request(name, 2, priority))
    assert [r.request_id for r in scheduler.waiting] == ["d", "b", "e", "a", "c"]
    order: list[str] = []
    while scheduler.has_work:
        order += [name for name in names(run(scheduler)) if name not in order]
    assert order == ["d", "b", "e", "a", "c"]


def test_with_seats_full_the_worst_gives_way_to_a_strictly_better_one_only() -> None:
    scheduler = make_scheduler(seqs=2)
    old, young = make_request("old", 2, 1, 20), make_request("young", 2, 1, 20)
    scheduler.add(old)
    scheduler.add(young)
    run(scheduler)
    scheduler.add(make_request("equal", 2, 1, 20))
    assert run(scheduler).preempted == ()
    scheduler.add(make_request("better", 2, 0, 3))
    plan = run(scheduler)
    assert plan.preempted == (young,)
    assert sorted(names(plan)) == ["better", "old"]
    # No to and fro: the one displaced waits for a seat, before the one that came after it.
    preemptions = 1
    while old.state is not RequestState.FINISHED:
        preemptions += len(run(scheduler).preempted)
    assert preemptions == scheduler.num_preemptions == 1
    assert young.num_output_tokens > 2


def test_with_room_enough_nobody_gives_way() -> None:
    scheduler = make_scheduler(seqs=3)
    scheduler.add(make_request("a", 2, 5, 20))
    run(scheduler)
    scheduler.add(make_request("b", 2, 0, 20))
    plan = run(scheduler)
    assert names(plan) == ["a", "b"]
    assert plan.preempted == ()


def test_with_the_pool_full_just_as_many_give_way_as_needed() -> None:
    scheduler = make_scheduler(num_blocks=12, budget=100)
    worse = [make_request(f"w{i}", 11, 1, 6) for i in range(3)]
    for request in worse:
        scheduler.add(request)
        run(scheduler)
    assert scheduler.pool.num_available == 2
    scheduler.add(make_request("better", 20, 0))
    plan = run(scheduler)
    assert plan.preempted == (worse[2],)
    assert "better" in names(plan)
    assert worse[0].state is not RequestState.WAITING


def test_nobody_gives_way_in_vain() -> None:
    scheduler = make_scheduler(num_blocks=10, budget=100)
    best, worst = make_request("best", 22, 0, 10), make_request("worst", 6, 2, 10)
    scheduler.add(best)
    scheduler.add(worst)
    run(scheduler)
    scheduler.add(make_request("middle", 30, 1))
    for _ in range(3):
        assert run(scheduler).preempted == ()
    assert worst.state is RequestState.RUNNING


def test_a_better_prompt_overtakes_one_that_is_under_way() -> None:
    scheduler = make_scheduler(num_blocks=200, budget=64)
    scheduler.add(make_request("long", 400, 1))
    run(scheduler)
    scheduler.add(make_request("urgent", 10, 0))
    plan = run(scheduler)
    assert [(row.request.request_id, row.num_tokens) for row in plan.rows] == [("urgent", 10), ("long", 54)]
    assert plan.preempted == ()


@pytest.mark.parametrize("budget", [8, 256, 2048])
def test_prompts_wait_for_decodes_and_do_not_make_them_wait(budget: int) -> None:
    """Nobody who decodes misses a step, and no step with a decode has more prompt tokens than the limit."""
    scheduler = make_scheduler(num_blocks=1000, budget=budget)
    limit = min(budget, max(budget // PROMPT_PART, MIN_PROMPT_TOKENS))
    decoding = [make_request(f"d{i}", 2, 5, 60) for i in range(3)]
    for request in decoding:
        scheduler.add(request)
    while not all(request.num_output_tokens for request in decoding):
        run(scheduler)
    for i in range(5):
        scheduler.add(make_request(f"long{i}", 700, 0, 1))
    for _ in range(12):
        plan = run(scheduler)
        assert names(plan)[:3] == ["d0", "d1", "d2"]
        assert 0 < plan.num_tokens - 3 <= limit


def test_alone_a_prompt_has_the_whole_budget() -> None:
    scheduler = make_scheduler(num_blocks=2000, budget=2048)
    scheduler.add(make_request("long", 3000))
    assert run(scheduler).num_tokens == 2048


def test_drafts_take_no_token_from_others() -> None:
    scheduler = make_scheduler(budget=6)
    requests = [make_request(f"r{i}", 1, 0, 50) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    run(scheduler)
    for request in requests:
        request.draft_ids = [1, 2, 3, 4, 5]
    plan = scheduler.schedule()
    assert [row.num_tokens for row in plan.rows] == [3, 1, 1, 1]
    assert [row.num_drafts for row in plan.rows] == [2, 0, 0, 0]


def test_drafts_take_no_block_from_others_and_end_with_the_sequence() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=2)
    request = make_request("r", 2, 0, 2)
    scheduler.add(request)
    run(scheduler)
    request.draft_ids = [1, 2, 3]
    row = scheduler.schedule().rows[0]
    assert (row.num_drafts, row.num_tokens) == (0, 1), "the next token is its last"


@pytest.mark.parametrize("seqs", [1, 4])
def test_a_stream_of_better_requests_does_not_starve_an_old_one(seqs: int) -> None:
    scheduler = make_scheduler(num_blocks=16, seqs=seqs, budget=16)
    for i in range(seqs):
        scheduler.add(make_request(f"first{i}", 5, 0))
    old = [make_request(f"old{i}", 5, 9) for i in range(3)]
    for request in old:
        scheduler.add(request)
    admitted: set[str] = set()
    for i in range(2000):
        if len(scheduler.waiting) < len(old) + 5:
            scheduler.add(make_request(f"stream{i}", 5, 0))
        admitted.update(names(run(scheduler)))
        for m, request in enumerate(old):
            if len(admitted) > (m + 1) * (MAX_PASSES + 1) + seqs:
                assert request.request_id in admitted
        if old[-1].state is RequestState.FINISHED:
            break
    assert all(request.finish_reason == "length" for request in old)
    assert all(request.is_promoted for request in old)
    assert all(request.num_preemptions == 0 for request in old), "a promoted sequence keeps its place"


def test_the_line_promotes_at_its_interval_only() -> None:
    line = WaitingLine()
    requests = [make_request(str(i), 1, 1 if i < 3 else 0) for i in range(100)]
    for i, request in enumerate(requests):
        request.arrival = i
        line.push(request)
    order = [line.admit().request_id for _ in range(60)]
    line.check()
    late = [str(i) for i in range(3, 100)]
    assert order[:MAX_PASSES] == late[:MAX_PASSES]
    assert [order.index(str(i)) for i in range(3)] == [MAX_PASSES, 2 * MAX_PASSES, 3 * MAX_PASSES]
    assert [name for name in order if int(name) >= 3] == late[:57]


def test_without_priorities_it_is_first_come_first_served() -> None:
    line = WaitingLine()
    requests = [make_request(str(i), 1) for i in range(100)]
    for i, request in enumerate(requests):
        request.arrival = i
    for request in random.Random(0).sample(requests, 100):
        line.push(request)
    assert [line.admit() for _ in range(100)] == requests
