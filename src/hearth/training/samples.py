"""Rows that are samples: a preference pair, a judged answer, a prompt. From samples to packed tensors.

The sequences of a micro-batch are packed into rows no longer than the longest of them, first fit decreasing,
so there is little padding and attention stays as cheap as it was. How they are packed does not change a loss.

Shape suffixes: B rows, T positions, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hearth.errors import DataError
from hearth.training.batches import IGNORE, Batch, Rows, Sequences

_WIDTH_STEP = 16  # rows are widened to a multiple of this, so that shapes repeat


@dataclass(frozen=True)
class Sample:
    """Parts of (token ids, which count in the loss); ``label`` judges the only part; ``fields``: the rest."""

    parts: tuple[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]], ...]
    label: float = 1.0
    fields: Mapping[str, Any] = field(default_factory=dict)


class SampleRows:
    """The samples of a split of a prepared dataset that fit into ``max_length`` positions, as rows.

    What is longer is dropped and counted, or with ``truncate`` loses the beginning of its prompt
    (``hearth.data.SampleRows``).
    """

    def __init__(self, split: Any, *, kind: str, max_length: int, truncate: bool = False) -> None:
        from hearth.data import SampleRows as Fitting

        self.split, self.kind = split, kind
        if split.kind != kind:
            raise DataError(
                f"the dataset {split.dataset.path} holds {split.kind}, the objective needs {kind}",
                fix=f"prepare it with data.sources[].format: {kind}",
            )
        self.fitting = Fitting(split, max_length, truncate=truncate)

    def __len__(self) -> int:
        return len(self.fitting)

    def __getitem__(self, index: int) -> Sample:
        parts = tuple((tokens.astype(np.int64), mask) for tokens, mask in self.fitting.parts(index))
        fields: Mapping[str, Any] = {}
        if self.kind in ("feedback", "prompts"):
            fields = self.split.document_info(int(self.fitting.documents[index])).get("fields", {})
        return Sample(parts, float(fields.get("label", 1.0)), fields)


def sample_rows(
    dataset: Any, split: str, *, kind: str, max_length: int, truncate: bool = False
) -> Rows | None:
    """Samples of a Hearth dataset, of one split of it, or samples as they are. None stays None."""
    if dataset is None:
        return None
    if callable(getattr(dataset, "split", None)):
        dataset = dataset.split(split)
    if hasattr(dataset, "parts"):
        rows: Rows = SampleRows(dataset, kind=kind, max_length=max_length, truncate=truncate)
        return rows
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{type(dataset).__name__} is no dataset",
            fix="give a hearth.data.Dataset, one split of it, or a sequence of hearth.training.Sample",
        )
    if len(dataset) and not isinstance(dataset[0], Sample):
        raise DataError(
            f"a row is a {type(dataset[0]).__name__}, the objective needs {kind} samples",
            fix="give a sequence of hearth.training.Sample",
        )
    given: Rows = dataset
    return given


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which pieces share a row of ``capacity``: first fit, longest first. Every piece must fit alone."""
    rows: list[list[int]] = []
    free: list[int] = []
    for piece in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        place = next((row for row, space in enumerate(free) if space >= lengths[piece]), None)
        if place is None:
            place = len(rows)
            rows.append([])
            free.append(capacity)
        rows[place].append(piece)
        free[place] -= lengths[piece]
    return rows


def collate_samples(samples: Sequence[Sample], indices: Sequence[int] = ()) -> Batch:
    """All sequences of these samples, packed. Sequence s is segment s; samples keep their order.

    A sequence of n tokens gives n - 1 positions, as in pretraining: its last token is only a target.
    """
    sequences = [
        (number, side, part)
        for number, sample in enumerate(samples)
        for side, part in enumerate(sample.parts)
    ]
    lengths = [len(tokens) - 1 for _, _, (tokens, _) in sequences]
    assert all(length > 0 for length in lengths), "a sequence needs two tokens"
    width = -(-max(lengths) // _WIDTH_STEP) * _WIDTH_STEP
    rows = first_fit(lengths, width)
    shape = (len(rows), width)
    input_ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    positions, segments = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    for b, row in enumerate(rows):
        at = 0
        for s in row:
            tokens, mask = sequences[s][2]
            here = slice(at, at + lengths[s])
            input_ids[b, here] = tokens[:-1]
            labels[b, here] = np.where(mask[1:], tokens[1:], IGNORE)
            positions[b, here] = np.arange(lengths[s])
            segments[b, here] = s
            at += lengths[s]
        positions[b, at:] = np.arange(width - at)
    return Batch(
        input_ids_BT=torch.from_numpy(input_ids),
        labels_BT=torch.from_numpy(labels),
        position_ids_BT=torch.from_numpy(positions),
        segment_ids_BT=torch.from_numpy(segments),
        num_valid=int((labels != IGNORE).sum()),
        num_tokens=sum(lengths),
        rows=tuple(indices),
        sequences=Sequences(
            samples_S=torch.tensor([number for number, _, _ in sequences]),
            sides_S=torch.tensor([side for _, side, _ in sequences]),
            labels_S=torch.tensor([samples[number].label for number, _, _ in sequences]),
        ),
    )
