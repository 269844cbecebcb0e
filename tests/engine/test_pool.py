"""The block pool: matching, sharing, least recently used first."""

from __future__ import annotations

from hearth.engine.params import SamplingParams
from hearth.engine.pool import BlockPool, hash_block
from hearth.engine.request import Request


def make_request(tokens: list[int]) -> Request:
    return Request("r", 0, tokens, SamplingParams(), 1)


def compute(pool: BlockPool, request: Request) -> None:
    """Give the request all its blocks and commit them."""
    assert pool.grow(request, len(request.tokens))
    request.num_computed = len(request.tokens)
    pool.commit(request)


def test_a_full_match_leaves_one_token_to_compute() -> None:
    pool = BlockPool(8, 4)
    first = make_request(list(range(8)))
    compute(pool, first)
    pool.release(first)
    assert (pool.num_free, pool.num_cached, pool.num_used) == (6, 2, 0)
    again = make_request(list(range(8)))
    assert pool.match(again) == 4  # not 8: the last token needs logits
    longer = make_request(list(range(9)))
    assert pool.match(longer) == 8
    pool.check([again, longer])


def test_running_sequences_share_blocks_and_the_last_owner_frees_them() -> None:
    pool = BlockPool(8, 4)
    first, second = make_request(list(range(9))), make_request([*range(8), 99])
    compute(pool, first)
    assert pool.match(second) == 8
    assert second.block_ids == first.block_ids[:2]
    pool.release(first)
    pool.check([second])
    assert pool.num_used == 2
    pool.release(second)
    assert pool.num_used == 0


def test_different_beginning_means_no_match_for_an_equal_block() -> None:
    pool = BlockPool(8, 4)
    compute(pool, make_request([1, 2, 3, 4, 5, 6, 7, 8]))
    assert pool.match(make_request([9, 9, 9, 9, 5, 6, 7, 8, 0])) == 0
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
    assert pool.match(make_request([4, 5, 6])) == 2
    assert pool.match(make_request([1, 2, 3])) == 0


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
    assert pool.match(make_request([1, 2, 3, 4])) == 0


def test_reset_forgets_used_and_unused_prefixes() -> None:
    pool = BlockPool(4, 2)
    kept, gone = make_request([1, 2, 3]), make_request([4, 5, 6])
    compute(pool, kept)
    compute(pool, gone)
    pool.release(gone)
    pool.reset_cache()
    pool.check([kept])
    assert pool.num_cached == 0
    assert pool.match(make_request([1, 2, 3])) == 0
