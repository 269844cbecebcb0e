"""Swapping: the choice between copying and computing, and the host pool's bookkeeping."""

from __future__ import annotations

import pytest

from hearth.engine.params import SamplingParams
from hearth.engine.plan import Plan, PlanRow
from hearth.engine.pool import BlockPool
from hearth.engine.request import Request
from hearth.engine.swap import Costs, HostPool, swapping_is_cheaper


def make_request(tokens: list[int], name: str = "r") -> Request:
    return Request(name, 0, tokens, SamplingParams(), 1)


def compute(pool: BlockPool, request: Request) -> None:
    assert pool.grow(request, len(request.tokens))
    request.num_computed = len(request.tokens)
    pool.commit(request)


def test_the_cheaper_way_is_chosen() -> None:
    """Qwen3-0.6B has 114,688 bytes a token: copying it out and in at 20 GB/s takes 11.5 microseconds."""
    costs = Costs(bytes_per_second=20e9, seconds_per_token=12e-6)
    assert swapping_is_cheaper(114_688 * 1000, 1000, costs)
    costs.seconds_per_token = 11e-6
    assert not swapping_is_cheaper(114_688 * 1000, 1000, costs)


def test_what_was_not_measured_is_free() -> None:
    assert not swapping_is_cheaper(1, 1, Costs())
    assert not swapping_is_cheaper(1, 1, Costs(bytes_per_second=1e12))
    assert swapping_is_cheaper(10**12, 1, Costs(seconds_per_token=1e-9))


def test_only_steps_of_prompts_are_measured_and_a_slow_first_one_is_forgotten() -> None:
    request = make_request([1])

    def plan(*counts: int) -> Plan:
        return Plan(tuple(PlanRow(request, 0, n, (0,) * n, (0,), 1, True) for n in counts))

    costs = Costs()
    costs.observe(plan(*[1] * 40), 1.0)
    costs.observe(plan(15), 1.0)
    assert costs.seconds_per_token is None
    costs.observe(plan(100), 50.0)
    assert costs.seconds_per_token == 0.5
    for _ in range(30):
        costs.observe(plan(99, 1), 0.1)
    assert costs.seconds_per_token == pytest.approx(0.001, rel=0.02)


def test_all_wanted_blocks_have_a_slot_or_none() -> None:
    host = HostPool(3)
    assert host.want([b"a", b"b"])
    assert not host.want([b"c", b"d"])
    assert host.want([b"a", b"c"])
    assert host.save(b"z") is None
    slots = [host.save(name) for name in (b"a", b"b", b"c")]
    assert sorted(slots) == [0, 1, 2]  # type: ignore[type-var]
    assert host.save(b"a") is None, "saved already"
    host.check([[b"a", b"b"], [b"a", b"c"]])
    host.unwant([b"a", b"b"])
    assert b"a" in host
    assert b"b" not in host
    assert host.num_free == 0, "the step under way may still read it"
    assert not host.want([b"d"])
    host.begin_step()
    assert host.num_free == 1
    assert host.want([b"d"])
    host.check([[b"a", b"c"], [b"d"]])


def test_what_a_failed_step_should_have_saved_is_forgotten() -> None:
    host = HostPool(2)
    assert host.want([b"a", b"b"])
    slots = [host.save(b"a"), host.save(b"b")]
    host.forget([slot for slot in slots[:1] if slot is not None])
    assert b"a" not in host
    assert b"b" in host
    host.check([[b"a", b"b"]])
    assert host.save(b"a") is not None


def test_only_blocks_that_are_taken_are_copied_and_they_come_back() -> None:
    host = HostPool(8)
    pool = BlockPool(4, 2, host=host)
    victim = make_request([1, 2, 3, 4, 5, 6, 7])
    compute(pool, victim)
    hashes = list(victim.block_hashes)
    blocks = list(victim.block_ids)
    assert pool.count_lost(victim) == 3
    pool.want(victim)
    pool.release(victim)
    assert pool.take_copies() == ((), ()), "nothing was overwritten yet"
    taker = make_request([9, 9, 9, 9, 9], "taker")
    compute(pool, taker)
    # The block that was not full was free; of the cached ones the end of the sequence goes first.
    swap_out, _ = pool.take_copies()
    assert [block for block, _ in swap_out] == [blocks[2], blocks[1]]
    assert pool.find(victim) == [blocks[0], None, None]
    pool.release(taker)
    pool.begin_step()
    saved = {hashes[2]: 0, hashes[1]: 1}
    assert {h: host._slot_of[h] for h in saved} == saved
    found = pool.find(victim)
    pool.begin(victim, found)
    swap_out, swap_in = pool.take_copies()
    assert swap_out == ()
    assert [slot for slot, _ in swap_in] == [saved[hashes[1]], saved[hashes[2]]]
    assert [block for _, block in swap_in] == victim.block_ids[1:]
    assert victim.num_computed == 6
    assert host.num_stored == 0
    pool.check([victim])
    host.check()
    pool.begin_step()
    assert host.num_free == 8


def test_a_block_that_two_want_is_copied_in_once() -> None:
    host = HostPool(4)
    pool = BlockPool(6, 2, host=host)
    first, second = make_request([1, 2, 3, 4, 5], "a"), make_request([1, 2, 3, 4, 6], "b")
    compute(pool, first)
    pool.begin(second, pool.find(second))
    compute(pool, second)
    assert pool.count_lost(first) == 0, "the other one still holds them"
    for request in (first, second):
        pool.want(request)
        pool.release(request)
    taker = make_request([9] * 12)
    compute(pool, taker)
    assert len(pool.take_copies()[0]) == 2
    pool.release(taker)
    pool.begin_step()
    for request in (first, second):
        pool.begin(request, pool.find(request))
    assert len(pool.take_copies()[1]) == 2
    assert first.block_ids == second.block_ids
    pool.check([first, second])
    pool.begin_step()
    assert host.num_free == 4


def test_ending_while_away_returns_the_slots() -> None:
    host = HostPool(4)
    pool = BlockPool(3, 2, host=host)
    victim = make_request([1, 2, 3, 4, 5])
    compute(pool, victim)
    pool.want(victim)
    pool.release(victim)
    compute(pool, make_request([9] * 6))
    assert host.num_stored == 2
    pool.unwant(victim)
    pool.begin_step()
    assert host.num_free == 4
