"""Drafts by looking up the last tokens: the right match, found step by step, and silence where it fails."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from hearth.engine.draft.ngram import LONGEST, NgramDrafter, NgramIndex
from hearth.engine.params import SamplingParams
from hearth.engine.request import Request


def search(tokens: list[int], count: int) -> list[int]:
    """The rule, by rescanning the text: longest match first, then the most recent one."""
    for length in range(min(LONGEST, len(tokens)), 0, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                period = len(tokens) - end
                return [tokens[end + i % period] for i in range(count)]
    return []


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.lists(st.integers(1, 7)), st.integers(1, 6))
def test_lookup_is_the_same_as_a_search(tokens: list[int], strides: list[int], count: int) -> None:
    index = NgramIndex()
    end = 1
    for stride in [0, *strides]:  # the text grows by one to several tokens a step
        end = min(end + stride, len(tokens))
        assert index.lookup(tokens[:end], count) == search(tokens[:end], count)
    assert index.lookup(tokens, count) == search(tokens, count)


def test_longest_match_wins_over_the_most_recent() -> None:
    text = [1, 2, 3, 10, 9, 3, 11, 1, 2, 3]
    assert NgramIndex().lookup(text, 2) == [10, 9]
    assert NgramIndex().lookup([*text, 10, 9, 3], 2) == [11, 1]


def test_a_repetition_goes_on() -> None:
    assert NgramIndex().lookup([5, 1, 2, 1, 2], 4) == [1, 2, 1, 2]
    assert NgramIndex().lookup([7, 7], 3) == [7, 7, 7]
    assert NgramIndex().lookup([1, 2, 3], 3) == []
    assert NgramIndex().lookup([1], 3) == []


def test_the_index_grows_with_the_text_and_no_faster() -> None:
    index = NgramIndex()
    text = list(range(1000))
    for end in range(1, 1001):
        index.lookup(text[:end], 4)
    assert len(index._after) <= LONGEST * len(text)


def run_drafter(next_token: list[int], num_draft_tokens: int = 4) -> tuple[int, int, Request]:
    """Let a drafter meet a text that is known already; returns proposals, right drafts, the request."""
    drafter = NgramDrafter()
    request = Request("r", 0, next_token[:5], SamplingParams(), 10_000)
    num_proposals = num_right = 0
    while len(request.tokens) < len(next_token):
        request.draft_ids = []
        drafter.propose({request: num_draft_tokens}, [request])
        rest = next_token[len(request.tokens) :]
        accepted = 0
        while (
            accepted < min(len(request.draft_ids), len(rest))
            and request.draft_ids[accepted] == rest[accepted]
        ):
            accepted += 1
        num_proposals += bool(request.draft_ids)
        num_right += accepted
        request.tokens += rest[: accepted + 1]
        drafter.observe(request, len(request.draft_ids), accepted)
    return num_proposals, num_right, request


def test_it_falls_silent_on_random_text() -> None:
    rng = random.Random(0)
    text = [rng.randrange(50) for _ in range(4000)]
    num_proposals, _, _ = run_drafter(text)
    assert num_proposals < 0.1 * len(text)


def test_it_speaks_again_when_the_text_repeats() -> None:
    rng = random.Random(1)
    noise = [rng.randrange(1000) for _ in range(300)]
    noise = [token % 40 for token in noise]
    num_proposals, num_right, _ = run_drafter([*noise, *list(range(50, 80)) * 40])
    assert num_right > 700
    assert num_proposals > 200


def test_an_allowance_of_one_gets_one() -> None:
    drafter = NgramDrafter()
    request = Request("r", 0, [1, 2, 1, 2], SamplingParams(), 10)
    drafter.propose({request: 1}, [request])
    assert request.draft_ids == [1]


def test_nothing_is_kept_of_a_request_that_is_gone() -> None:
    drafter = NgramDrafter()
    request = Request("r", 0, [1, 2, 1, 2], SamplingParams(), 10)
    drafter.propose({request: 1}, [request])
    assert len(drafter._lookups) == 1
    del request
    assert not drafter._lookups
