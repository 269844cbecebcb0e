"""Streaming text: never half a character, and the pieces make the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hearth.engine.detokenize import Detokenizer, StopChecker, decoder_of

TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé日🎉 \n")), max_size=60)


def byte_decoder() -> Any:
    """One id per byte: the hardest case, where most ids are no character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


BYTES = byte_decoder()


def decode(ids: Any) -> str:
    return str(BYTES.decode(list(ids), skip_special_tokens=True))


def stream(ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode, prompt)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(0, 40))
def test_pieces_make_the_whole_and_hold_whole_characters(text: str, cut: int) -> None:
    ids = BYTES.encode(text).ids
    cut = min(cut, len(ids))
    pieces = stream(ids[cut:], ids[:cut])
    whole_before = decode(ids[:cut]).rstrip("\ufffd") if "\ufffd" not in text else None
    if whole_before is not None:
        assert "".join(pieces) == text[len(whole_before) :]
        assert all("\ufffd" not in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=80))
def test_random_bytes_make_what_decoding_all_at_once_makes(ids: list[int]) -> None:
    assert "".join(stream(ids, [])) == decode(ids)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(3, 319), min_size=1, max_size=60))
def test_random_ids_of_a_trained_tokenizer(tokenizer: Any, ids: list[int]) -> None:
    decode_all = decoder_of(tokenizer)
    detokenizer = Detokenizer(decode_all, [1])
    pieces = [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["Hello", ""])
def test_sentencepiece_spaces_continue_the_prompt(prompt: str) -> None:
    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "▁again": 3, "!": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    start = [1] if prompt else []
    detokenizer = Detokenizer(lambda ids: tokenizer.decode(list(ids)), start)
    pieces = [detokenizer.push(token_id) for token_id in [2, 3, 4] * 12]
    expected = tokenizer.decode([*start, *[2, 3, 4] * 12])[len(prompt) :]
    assert "".join(pieces) == expected
    assert pieces[:3] == [" world" if prompt else "world", " again", "!"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_texts_do_not_depend_on_the_chunking(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    cuts = [whole.find(stop) for stop in stops if stop in whole]
    checker = StopChecker(stops)
    shown, stopped = "", False
    for piece in pieces:
        text, stopped = checker.push(piece)
        shown += text
        assert not any(stop in shown for stop in stops)
        if stopped:
            break
    if not stopped:
        shown += checker.flush()
    assert stopped == bool(cuts)
    if not cuts:
        assert shown == whole
    else:
        # Character by character the stop that completes first wins; a chunk may complete two at once, and
        # then the one that begins first does. Either way nothing of a stop is shown.
        assert whole.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert any(whole.startswith(stop, len(shown)) for stop in stops)


def test_what_may_be_a_stop_is_held_back() -> None:
    checker = StopChecker(["<end>"])
    assert checker.push("hello <en") == ("hello ", False)
    assert checker.push("try") == ("<entry", False)
    assert checker.push("<end> more") == ("", True)


def test_special_tokens_are_text_where_they_are_asked_for(tokenizer) -> None:
    special = tokenizer.eos_token_id
    ids = [*tokenizer("a", add_special_tokens=False)["input_ids"], special]
    assert tokenizer.eos_token not in decoder_of(tokenizer)(ids)
    assert decoder_of(tokenizer, skip_special_tokens=False)(ids).endswith(tokenizer.eos_token)
