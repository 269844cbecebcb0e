"""Packed rows: isolated documents, shifted labels, masks, padding."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hearth.data import IGNORE, Dataset, PackedRows

Prepare = Callable[..., Dataset]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("sequence_length", [7, 64, 1000])
def test_rows_hold_every_pair_of_every_document_once(
    prepare: Prepare, corpus: Path, sequence_length: int, packing: bool
) -> None:
    split = prepare(corpus).split("train")
    rows = PackedRows(split, sequence_length, packing=packing, seed=5)
    seen: Counter[tuple[int, int]] = Counter()
    for number in range(len(rows)):
        row = rows[number]
        at = 0
        for segment, (document, start, count) in enumerate(rows.segments(number)):
            tokens = split.tokens(document)
            here = slice(at, at + count)
            assert row.input_ids[here].tolist() == tokens[start : start + count].tolist()
            assert row.labels[here].tolist() == tokens[start + 1 : start + count + 1].tolist()
            assert row.position_ids[here].tolist() == list(range(count))
            assert set(row.segment_ids[here].tolist()) == {segment}
            seen.update((document, start + offset) for offset in range(1, count + 1))
            at += count
        padding = slice(at, sequence_length)
        assert set(row.segment_ids[padding].tolist()) <= {-1}
        assert set(row.labels[padding].tolist()) <= {IGNORE}
        assert set(row.input_ids[padding].tolist()) <= {1}
        assert row.position_ids[padding].tolist() == list(range(sequence_length - at))
        assert all(array.dtype == np.int64 for array in vars(row).values())
    wanted = Counter((d, t) for d in range(len(split)) for t in range(1, int(split.lengths[d])))
    assert seen == wanted


@pytest.fixture
def chat(prepare: Prepare, write_jsonl: Callable[..., Path], tokenizer_dir: Path) -> Dataset:
    rows = [{"q": "the fox " * (n % 9 + 1), "a": f"dog {n} " * (n % 7 + 1)} for n in range(80)]
    source = {"path": str(write_jsonl(rows)), "prompt_field": "q", "response_field": "a"}
    return prepare(source, tokenizer_dir=tokenizer_dir)


def test_only_the_answers_are_labels(chat: Dataset) -> None:
    split = chat.split("train")
    rows = PackedRows(split, 128)
    labels = sum(int((rows[number].labels != IGNORE).sum()) for number in range(len(rows)))
    assert labels == split.num_supervised_tokens
    assert rows.plan.num_dropped == 0
    row, (document, start, count) = rows[0], rows.segments(0)[0]
    mask = split.loss_mask(document)
    assert mask is not None
    assert start == 0
    assert ((row.labels[:count] != IGNORE) == mask[1 : count + 1]).all()


def test_long_conversations_are_dropped_and_counted_or_cut(chat: Dataset) -> None:
    split = chat.split("train")
    too_long = int((split.lengths - 1 > 50).sum())
    assert 0 < too_long < len(split)
    dropped, cut = PackedRows(split, 50), PackedRows(split, 50, truncate=True)
    assert dropped.plan.num_dropped == cut.plan.num_truncated == too_long
    assert len(set(dropped.plan.documents.tolist())) == len(split) - too_long
    assert len(set(cut.plan.documents.tolist())) == len(split)


def test_texts_beside_conversations_are_kept_whole(
    prepare: Prepare, write_jsonl: Callable[..., Path], tokenizer_dir: Path, corpus: Path
) -> None:
    chat = write_jsonl([{"q": f"fox {n}", "a": "dog " * (n % 60 + 1)} for n in range(60)])
    sources = [{"path": str(chat), "prompt_field": "q", "response_field": "a"}, {"path": str(corpus)}]
    split = prepare("unused", sources=sources, tokenizer_dir=tokenizer_dir).split("train")
    rows = PackedRows(split, 40)
    assert 0 < split.conversations.sum() < len(split)
    long_texts = np.flatnonzero(~split.conversations & (split.lengths > 41))
    assert len(long_texts)
    assert set(long_texts.tolist()) <= set(rows.plan.documents.tolist())
    assert rows.plan.num_dropped == int((split.conversations & (split.lengths > 41)).sum()) > 0
    mask = split.loss_mask(int(long_texts[0]))
    assert mask is not None
    assert mask.all()


def test_batches_stack_rows(chat: Dataset) -> None:
    rows = PackedRows(chat.split("train"), 64)
    batch = rows.batch([2, 0])
    assert set(batch) == {"input_ids", "labels", "position_ids", "segment_ids"}
    assert batch["labels"].shape == (2, 64)
    assert batch["labels"][1].tolist() == rows[0].labels.tolist()


def test_rows_end_and_travel(chat: Dataset) -> None:
    rows = PackedRows(chat.split("train"), 64)
    with pytest.raises(IndexError):
        rows[len(rows)]
    copy = pickle.loads(pickle.dumps(rows))
    assert copy[1].input_ids.tolist() == rows[1].input_ids.tolist()
