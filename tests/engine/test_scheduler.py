"""The scheduler under random workloads: invariants after every step, nobody lost, nobody starved."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from hearth.engine.params import SamplingParams
from hearth.engine.plan import Plan
from hearth.engine.pool import BlockPool
from hearth.engine.request import Request, RequestState
from hearth.engine.scheduler import Scheduler


def make_scheduler(num_blocks: int = 16, block_size: int = 4, seqs: int = 8, budget: int = 16) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size), max_num_seqs=seqs, max_num_batched_tokens=budget)


def make_request(name: str, prompt: list[int], max_new: int = 4) -> Request:
    return Request(name, 0, prompt, SamplingParams(max_tokens=max_new), max_new)


def sample(scheduler: Scheduler, plan: Plan, next_token: Callable[[Request], int]) -> list[Request]:
    """Play the part of the model: one token to each row that samples; finish those that are full."""
    finished = []
    for request in [row.request for row in plan.rows if row.samples]:
        request.tokens.append(next_token(request))
        if request.num_output_tokens >= request.max_new_tokens:
            scheduler.finish(request, "length")
            finished.append(request)
    return finished


def check_plan(scheduler: Scheduler, plan: Plan) -> None:
    scheduler.check()
    assert plan.num_tokens <= scheduler.max_num_batched_tokens
    keys = [row.request.key for row in plan.rows]
    assert len(set(keys)) == len(keys)
    block_size = scheduler.pool.block_size
    written: set[tuple[int, int]] = set()
    for row in plan.rows:
        assert row.token_ids == tuple(row.request.tokens[row.start : row.end])
        assert len(row.block_ids) * block_size >= row.end
        assert row.samples == (row.end == len(row.request.tokens))
        for position in range(row.start, row.end):
            slot = (row.block_ids[position // block_size], position % block_size)
            assert slot not in written, "two sequences write one slot"
            written.add(slot)
    for row in plan.rows:  # what is read but not written now must not be written by another row
        for position in range(row.start):
            slot = (row.block_ids[position // block_size], position % block_size)
            if slot in written:
                writer = next(r for r in plan.rows if r is not row and slot[0] in r.block_ids)
                assert writer.request.tokens[position] == row.request.tokens[position], (
                    "a shared block diverged"
                )


@pytest.mark.parametrize("seed", range(40))
def test_random_workload_keeps_every_invariant(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 8])
    scheduler = make_scheduler(
        num_blocks=rng.randint(48, 90) // block_size, block_size=block_size, seqs=rng.randint(1, 9),
        budget=rng.randint(1, 40),
    )  # fmt: skip
    capacity = scheduler.pool.num_blocks * block_size
    prefixes = [[rng.randrange(50) for _ in range(20)] for _ in range(3)]
    alive: dict[str, Request] = {}
    done: list[Request] = []
    added = 0
    for step in range(400):
        if added < 60 and rng.random() < 0.5:
            max_new = rng.randint(1, 12)
            prompt = [
                *rng.choice(prefixes)[: rng.randint(0, 20)],
                *(rng.randrange(50) for _ in range(rng.randint(1, 12))),
            ]
            prompt = prompt[: capacity - max_new]
            request = make_request(f"r{added}", prompt, max_new)
            scheduler.add(request)
            alive[request.request_id] = request
            added += 1
        if alive and rng.random() < 0.05:
            victim = rng.choice(list(alive.values()))
            scheduler.finish(victim, "abort")
            del alive[victim.request_id]
            scheduler.check()
        plan = scheduler.schedule()
        check_plan(scheduler, plan)
        if plan and rng.random() < 0.03:
            scheduler.fail_step(plan)
            for row in plan.rows:
                del alive[row.request.request_id]
        else:
            for request in sample(scheduler, plan, lambda _: rng.randrange(50)):
                done.append(request)
                del alive[request.request_id]
        scheduler.check()
        assert set(alive) == {r.request_id for r in scheduler.requests}, f"a request was lost in step {step}"
    while scheduler.has_work:
        plan = scheduler.schedule()
        check_plan(scheduler, plan)
        assert plan
        done.extend(sample(scheduler, plan, lambda _: rng.randrange(50)))
    assert scheduler.pool.num_used == 0
    assert all(r.num_output_tokens == r.max_new_tokens for r in done)
    assert added == 60


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    scheduler = make_scheduler(num_blocks=100, budget=8)
    short = make_request("short", [1, 2, 3], max_new=30)
    scheduler.add(short)
    sample(scheduler, scheduler.schedule(), lambda _: 7)
    scheduler.add(make_request("long", list(range(64)), max_new=2))
    for _ in range(6):
        plan = scheduler.schedule()
        assert [row.request.request_id for row in plan.rows] == ["short", "long"]
        assert plan.rows[0].samples
        assert plan.rows[1].num_tokens == 7
        sample(scheduler, plan, lambda _: 7)


def test_first_come_first_served() -> None:
    scheduler = make_scheduler(seqs=2, budget=100)
    for name in "abc":
        scheduler.add(make_request(name, [1, 2]))
    assert [row.request.request_id for row in scheduler.schedule().rows] == ["a", "b"]
    assert [r.request_id for r in scheduler.waiting] == ["c"]


def test_preemption_takes_the_youngest_and_it_comes_back() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=2, budget=32)
    old, young = make_request("old", [1, 2, 3, 4], 8), make_request("young", [5, 6], 8)
    scheduler.add(old)
    scheduler.add(young)
    seen_preempted = False
    for _ in range(60):
        plan = scheduler.schedule()
        check_plan(scheduler, plan)
        if plan.preempted:
            assert plan.preempted == (young,)
            assert young.state is RequestState.WAITING
            assert young.num_computed == 0
            seen_preempted = True
        sample(scheduler, plan, lambda _: 9)
        if not scheduler.has_work:
            break
    assert seen_preempted
    assert old.num_output_tokens == young.num_output_tokens == 8
    assert scheduler.num_preemptions == young.num_preemptions > 0


def test_a_failed_step_leaves_no_findable_block_behind() -> None:
    scheduler = make_scheduler()
    prompt = list(range(12))
    scheduler.add(make_request("a", prompt))
    scheduler.fail_step(scheduler.schedule())
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    again = make_request("b", prompt)
    scheduler.add(again)
    assert scheduler.schedule().rows[0].start == 0
    assert again.num_cached == 0
