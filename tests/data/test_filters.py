"""Each filter drops what it says; duplicates and the split are decided by content alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearth.config.recipe import FilterSection
from hearth.data.filters import (
    KEPT,
    REASONS,
    chat_key,
    filter_chat,
    filter_text,
    first_occurrences,
    held_out,
    split_hash,
    text_key,
)


@pytest.mark.parametrize(
    ("settings", "kept", "dropped"),
    [
        ({"min_chars": 5}, "abcde", "abcd"),
        ({"max_chars": 5}, "abcde", "abcdef"),
        ({"max_line_chars": 3}, "abc\nabc", "ab\nabcd"),
        ({"min_alphabetic": 0.5}, "ab 1\n2", "a 1 2"),
        ({"max_duplicate_lines": 0.25}, "a\nb\nc\n\n a", "a\nb\na\n\n"),
    ],
)
def test_a_filter_drops_only_beyond_its_limit(settings: dict[str, float], kept: str, dropped: str) -> None:
    filters = FilterSection.model_validate({"min_chars": 0, **settings})
    (name,) = settings
    assert filter_text(kept, filters) == KEPT
    assert REASONS[filter_text(dropped, filters)] == name


def test_the_defaults_drop_only_empty_texts() -> None:
    assert filter_text("1", FilterSection()) == KEPT
    assert REASONS[filter_text("", FilterSection())] == "min_chars"


def test_conversations_without_an_answer_or_with_control_tokens_are_dropped() -> None:
    ask = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "hello"}
    assert filter_chat([ask, answer], ["<|im_end|>"]) == KEPT
    assert REASONS[filter_chat([ask], [])] == "no_answer"
    assert REASONS[filter_chat([ask, {"role": "assistant", "content": " \n"}], [])] == "no_answer"
    forged = {"role": "user", "content": "x<|im_end|>y"}
    assert REASONS[filter_chat([forged, answer], ["<|im_end|>"])] == "control_tokens"


def test_equal_up_to_composition_and_trailing_space_is_a_duplicate() -> None:
    assert text_key("caf\u00e9\nx") == text_key("\n cafe\u0301  \nx\n\n".replace(" caf", "caf"))
    assert text_key("a b") != text_key("a  b")
    assert text_key("  indented\n  again") != text_key("indented\nagain\nx")
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert chat_key([ask, answer]) == chat_key([dict(ask), {**answer, "content": "b \n"}])
    assert chat_key([ask, answer]) != chat_key([{**ask, "role": "assistant"}, answer])
    assert chat_key([{"role": "user", "content": "a"}]) != text_key("a")


@given(st.lists(st.integers(0, 5), max_size=50))
def test_the_first_of_equal_keys_is_kept(values: list[int]) -> None:
    keys = np.array([list(value.to_bytes(16, "little")) for value in values], dtype=np.uint8).reshape(-1, 16)
    wanted = [value not in values[:index] for index, value in enumerate(values)]
    assert first_occurrences(keys).tolist() == wanted


def test_half_equal_keys_are_different() -> None:
    keys = np.zeros((3, 16), dtype=np.uint8)
    keys[1, 0], keys[2, 15] = 1, 1
    assert first_occurrences(keys).all()


@given(st.sets(st.text(max_size=10), min_size=200, max_size=300), st.integers(0, 5))
def test_more_documents_never_move_the_others(groups: set[str], seed: int) -> None:
    names = sorted(groups)
    hashes = np.array([split_hash(seed, name) for name in names], dtype=np.uint64)
    everything, fallback = held_out(hashes, 0.2)
    part, part_fallback = held_out(hashes[:150], 0.2)
    assert not fallback
    assert not part_fallback
    assert everything[:150].tolist() == part.tolist()


def test_the_share_is_about_the_fraction() -> None:
    hashes = np.array([split_hash(0, str(number)) for number in range(20_000)], dtype=np.uint64)
    assert 0.045 < held_out(hashes, 0.05)[0].mean() < 0.055


def test_a_small_corpus_holds_out_its_smallest_group() -> None:
    hashes = np.array([9, 5, 7, 5], dtype=np.uint64) << np.uint64(59)
    assert held_out(hashes, 1e-6)[0].tolist() == [False, True, False, True]
    assert held_out(hashes, 1e-6)[1]
    assert not held_out(hashes, 0.0)[0].any()
    assert held_out(hashes, 1.0)[0].all()
