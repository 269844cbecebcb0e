"""The pack plan: nothing lost, nothing twice, nothing over the edge, as tight as best-fit decreasing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearth.data.packing import PackPlan, best_fit_decreasing
from hearth.errors import ConfigError

lengths_lists = st.lists(st.integers(0, 60), max_size=60)


def rows_of(plan: PackPlan) -> list[list[tuple[int, int, int]]]:
    segments = list(zip(plan.documents.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    return [
        segments[start:stop] for start, stop in zip(plan.row_starts[:-1], plan.row_starts[1:], strict=True)
    ]


@given(lengths=lengths_lists, sequence_length=st.integers(1, 20), packing=st.booleans(), seed=st.integers())
def test_every_token_but_the_first_is_a_label_exactly_once(
    lengths: list[int], sequence_length: int, packing: bool, seed: int
) -> None:
    plan = PackPlan.build(lengths, sequence_length, packing=packing, seed=seed, window=16)
    labels = Counter(
        (document, token)
        for row in rows_of(plan)
        for document, start, count in row
        for token in range(start + 1, start + count + 1)
    )
    wanted = {(document, token) for document, n in enumerate(lengths) for token in range(1, n)}
    assert set(labels) == wanted
    assert set(labels.values()) <= {1}
    assert plan.num_too_short == sum(n < 2 for n in lengths)


@given(lengths=lengths_lists, sequence_length=st.integers(1, 20), packing=st.booleans(), seed=st.integers())
def test_no_row_overflows_and_none_is_empty(
    lengths: list[int], sequence_length: int, packing: bool, seed: int
) -> None:
    plan = PackPlan.build(lengths, sequence_length, packing=packing, seed=seed)
    sizes = [sum(count for _, _, count in row) for row in rows_of(plan)]
    assert all(1 <= size <= sequence_length for size in sizes)
    assert plan.num_pairs == sum(sizes)
    if sizes:
        assert plan.efficiency == pytest.approx(sum(sizes) / (len(sizes) * sequence_length))
    if not packing:
        assert all(len(row) == 1 for row in rows_of(plan))


@given(lengths=lengths_lists, sequence_length=st.integers(1, 20))
def test_conversations_too_long_are_dropped_or_cut_and_counted(
    lengths: list[int], sequence_length: int
) -> None:
    dropped = PackPlan.build(lengths, sequence_length, too_long="drop")
    cut = PackPlan.build(lengths, sequence_length, too_long="truncate")
    too_long = {index for index, n in enumerate(lengths) if n - 1 > sequence_length}
    assert dropped.num_dropped == cut.num_truncated == len(too_long)
    assert set(dropped.documents.tolist()) == {i for i, n in enumerate(lengths) if n > 1} - too_long
    assert set(cut.documents.tolist()) == {i for i, n in enumerate(lengths) if n > 1}
    assert len(cut.documents) == len(set(cut.documents.tolist()))
    assert cut.num_cut_tokens == sum(lengths[i] - 1 - sequence_length for i in too_long)


def test_texts_among_conversations_are_cut_and_not_dropped() -> None:
    plan = PackPlan.build([25, 25, 5], 10, too_long="drop", always_cut=[True, False, False])
    assert sorted(zip(plan.documents.tolist(), plan.starts.tolist(), strict=True)) == [
        (0, 0),
        (0, 10),
        (0, 20),
        (2, 0),
    ]
    assert plan.num_dropped == 1


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Free space of each row after placing the pieces one by one."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(free, length)
        insort(free, (capacity if at == len(free) else free.pop(at)) - length)
    return free


@given(lengths=st.lists(st.integers(1, 30), max_size=200))
def test_the_histogram_gives_the_rows_of_best_fit_decreasing(lengths: list[int]) -> None:
    histogram = np.bincount(np.array(lengths, dtype=np.int64), minlength=31).tolist()
    free = []
    placed: Counter[int] = Counter()
    for composition, num_rows in best_fit_decreasing(histogram, 30):
        free += [30 - sum(length * count for length, count in composition)] * num_rows
        for length, count in composition:
            placed[length] += count * num_rows
    assert sorted(free) == naive_best_fit_decreasing(lengths, 30)
    assert placed == Counter(lengths)


def test_the_plan_depends_on_lengths_and_seed_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500)
    first, again, other = (PackPlan.build(lengths, 128, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.documents, again.documents)
    assert np.array_equal(first.row_starts, again.row_starts)
    assert not np.array_equal(first.documents, other.documents)


def test_a_million_documents_pack_tightly() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000).astype(np.int64) + 2
    plan = PackPlan.build(lengths, 2048)
    assert plan.num_pairs == int((lengths - 1).sum())
    assert plan.padding < 0.001


def test_an_empty_split_gives_an_empty_plan() -> None:
    plan = PackPlan.build([], 16)
    assert (plan.num_rows, plan.num_pairs, plan.padding) == (0, 0, 0.0)


def test_a_row_of_no_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.sequence_length is 0"):
        PackPlan.build([5], 0)
