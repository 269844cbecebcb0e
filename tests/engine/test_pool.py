"""The block pool: matching, sharing, least recently used first."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from hearth.engine.params import SamplingParams
from hearth.engine.pool import BlockPool, hash_block
from hearth.engine.request import Request


def make_request(tokens: list[int], *, salt: str | None = None, **fields: Any) -> Request:
    return Request("r", 0, tokens, SamplingParams(cache_salt=salt), 1, **fields)


def compute(pool: BlockPool, request: Request) -> None:
    """Give the request all its blocks and commit them."""
    assert pool.grow(request, len(request.tokens))
    request.num_computed = len(request.tokens)
    pool.commit(request)


def match(pool: BlockPool, request: Request) -> int:
    """Begin with what the cache has; how many tokens that is."""
    pool.begin(request, pool.find(request))
    return request.num_computed


def test_a_full_match_leaves_one_token_to_compute() -> None:
    pool = BlockPool(8, 4)
    first = make_request(list(range(8)))
    compute(pool, first)
    pool.release(first)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (6, 2, 0)
    again = make_request(list(range(8)))
    assert match(pool, again) == 4  # not 8: the last token needs logits
    longer = make_request(list(range(9)))
    assert match(pool, longer) == 8
    pool.check([again, longer])


def test_running_sequences_share_blocks_and_the_last_owner_frees_them() -> None:
    pool = BlockPool(8, 4)
    first, second = make_request(list(range(9))), make_request([*range(8), 99])
    compute(pool, first)
    assert match(pool, second) == 8
    assert second.block_ids == first.block_ids[:2]
    pool.release(first)
    pool.check([second])
    assert pool.num_used == 2
    pool.release(second)
    assert pool.num_used == 0


def test_different_beginning_means_no_match_for_an_equal_block() -> None:
    pool = BlockPool(8, 4)
    compute(pool, make_request([1, 2, 3, 4, 5, 6, 7, 8]))
    assert match(pool, make_request([9, 9, 9, 9, 5, 6, 7, 8, 0])) == 0
    assert hash_block(b"", [5, 6]) != hash_block(hash_block(b"", [1]), [5, 6])


def test_the_least_recently_used_prefix_is_given_up_first() -> None:
    pool = BlockPool(4, 2)
    old, new = make_request([1, 2, 3]), make_request([4, 5, 6])
    for request in (old, new):
        compute(pool, request)
        pool.release(request)
    taker = make_request([7, 7, 7, 7, 7])
    compute(pool, taker)
    pool.release(taker)
    assert match(pool, make_request([4, 5, 6])) == 2
    assert match(pool, make_request([1, 2, 3])) == 0


def test_grow_is_all_or_nothing_and_keeps_a_reserve() -> None:
    pool = BlockPool(4, 2)
    request = make_request([0] * 20)
    assert not pool.grow(request, 9)
    assert request.block_ids == []
    assert not pool.grow(request, 8, keep=1)
    assert pool.grow(request, 8)
    assert pool.num_available == 0


def test_without_the_cache_nothing_is_kept() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    request = make_request([1, 2, 3, 4])
    compute(pool, request)
    pool.release(request)
    assert pool.num_free == 4
    assert match(pool, make_request([1, 2, 3, 4])) == 0


def test_reset_forgets_used_and_unused_prefixes() -> None:
    pool = BlockPool(4, 2)
    kept, gone = make_request([1, 2, 3]), make_request([4, 5, 6])
    compute(pool, kept)
    compute(pool, gone)
    pool.release(gone)
    pool.reset_cache()
    pool.check([kept])
    assert pool.num_cached == 0
    assert match(pool, make_request([1, 2, 3])) == 0


OTHERS: list[dict[str, Any]] = [
    {"salt": "a"}, {"salt": "b"}, {"adapter_hash": b"a"}, {"extra": b"a"}, {"salt": "a", "extra": b"a"},
    {"adapter_hash": b"aa"}, {"adapter_hash": b"a", "extra": b"a"}, {},
]  # fmt: skip


@pytest.mark.parametrize("first", range(len(OTHERS)))
def test_nothing_is_shared_across_salts_adapters_and_images(first: int) -> None:
    tokens = list(range(9))
    for second, fields in enumerate(OTHERS):
        pool = BlockPool(8, 4)
        compute(pool, make_request(tokens, **OTHERS[first]))
        assert match(pool, make_request(tokens, **fields)) == (8 if first == second else 0)


def test_no_salt_continues_the_blocks_of_somebody_else() -> None:
    """A salt whose bytes are those of another's first block does not lead to that block's successors."""
    pool = BlockPool(8, 2)
    tokens = [ord("a"), ord("b"), 5, 6, 7]
    compute(pool, make_request(tokens))
    for salt in ("ab", bytes(array("q", [97, 98]).tobytes()).decode()):
        assert match(pool, make_request([5, 6, 7], salt=salt)) == 0


def test_a_request_that_needs_every_position_matches_nothing_but_can_be_matched() -> None:
    pool = BlockPool(8, 4)
    tokens = list(range(9))
    whole = make_request(tokens, skip_prefix=True)
    compute(pool, whole)
    assert match(pool, make_request(tokens)) == 8
    assert match(pool, make_request(tokens, skip_prefix=True)) == 0


def test_looking_for_a_prefix_changes_nothing() -> None:
    pool = BlockPool(4, 2)
    old, new = make_request([1, 2, 3]), make_request([4, 5, 6])
    for request in (old, new):
        compute(pool, request)
        pool.release(request)
    assert pool.find(make_request([1, 2, 3])) == [0]
    taker = make_request([7] * 5)
    compute(pool, taker)  # takes the two free blocks and the least recently used one
    assert pool.find(make_request([1, 2, 3])) == []
    assert len(pool.find(make_request([4, 5, 6]))) == 1


def test_drafts_are_not_findable_and_their_blocks_are_taken_back() -> None:
    pool = BlockPool(8, 2)
    request = make_request([1, 2, 3])
    request.draft_ids = [4, 5, 6, 7]
    assert pool.grow(request, 7)
    request.num_computed = 7
    pool.commit(request)
    assert request.num_committed == 1
    request.draft_ids.clear()
    request.num_computed = 2
    pool.trim(request)
    assert len(request.block_ids) == 2
    pool.check([request])


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 9])
def test_blocks_out_of_every_window_go_back(window: int) -> None:
    size = 4
    pool = BlockPool(20, size, window=window)
    request = make_request([0])
    for position in range(60):
        pool.slide(request)
        assert pool.grow(request, position + 1)
        seen = set(range(max(0, position - window + 1), position + 1))
        held = {i * size + j for i in range(request.num_dropped, len(request.block_ids)) for j in range(size)}
        assert seen <= held
        assert pool.num_used <= -(-window // size) + 1
        pool.check([request])
        request.tokens.append(position)
        request.num_computed = position + 1
        pool.commit(request)
    assert pool.num_cached > 0
    pool.release(request)
    assert pool.num_used == 0
    again = make_request(list(request.tokens))
    assert match(pool, again) == 60
    pool.slide(again)
    pool.check([again])
    assert pool.num_used <= -(-window // size) + 1
