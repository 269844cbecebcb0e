"""From packed rows to tensors, and where in the data a run stands.

The order of rows is a pure function of (seed, epoch, position), so the position is one number: how many rows
the optimizer steps so far have consumed. Shape suffixes: B rows, T positions,
S sequences.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hearth.config.recipe import FimSection
from hearth.data.order import row_index
from hearth.errors import DataError

IGNORE = -100
SEGMENTS = "segment_ids_of_all_positions"  # in the extras of a batch that has some of the positions alone
# Rows that stand for all where a dataset has no fingerprint of its own.
_FINGERPRINT_ROWS = 256


class Rows(Protocol):
    """A sequence of packed rows, such as ``hearth.data.PackedRows``."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: int, /) -> Any:
        """A row with input_ids, labels, position_ids and segment_ids, each an array of T integers."""


@dataclass(frozen=True)
class Sequences:
    """What the segments of a batch are; segment s of the whole batch is sequence s.

    ``samples_S``: which of the batch's rows it belongs to; ``sides_S``: 0 the chosen (or only) one, 1 the
    rejected one; ``labels_S``: 1.0 for a good answer, 0.0 for a bad one.
    """

    samples_S: Tensor
    sides_S: Tensor
    labels_S: Tensor

    def __len__(self) -> int:
        return len(self.samples_S)

    def to(self, device: torch.device) -> Sequences:
        """The same on another device."""
        return Sequences(self.samples_S.to(device), self.sides_S.to(device), self.labels_S.to(device))


@dataclass(frozen=True)
class Batch:
    """Rows as tensors.

    ``labels_BT[b, t]`` is the target of input t, or -100; ``position_ids_BT`` starts again at 0 in each
    document; ``segment_ids_BT`` numbers the documents of a row, -1 is padding.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    position_ids_BT: Tensor
    segment_ids_BT: Tensor
    num_valid: int  # labels that count
    num_tokens: int  # positions that are not padding
    rows: tuple[int, ...] = ()  # which rows these are
    sequences: Sequences | None = None  # where rows are samples: what each segment is
    # Further tensors that an objective needs: old log-probabilities, advantages …
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        if device.type == "cpu":
            return self
        names = ("input_ids_BT", "labels_BT", "position_ids_BT", "segment_ids_BT")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        extras = {name: tensor.to(device, non_blocking=True) for name, tensor in self.extras.items()}
        sequences = None if self.sequences is None else self.sequences.to(device)
        return replace(self, **moved, extras=extras, sequences=sequences)

    def padded(self, num_rows: int, width: int) -> Batch:
        """With so many rows of so many positions; what is added is padding."""
        more_rows, more = num_rows - len(self.input_ids_BT), width - self.input_ids_BT.shape[1]
        if not more_rows and not more:
            return self

        def pad(tensor: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, more, 0, more_rows), value=value)

        positions = pad(self.position_ids_BT, 0)
        positions[:, width - more :] = torch.arange(more)
        positions[num_rows - more_rows :] = torch.arange(width)
        return replace(
            self,
            input_ids_BT=pad(self.input_ids_BT, 0),
            labels_BT=pad(self.labels_BT, IGNORE),
            position_ids_BT=positions,
            segment_ids_BT=pad(self.segment_ids_BT, -1),
        )

    def at(self, positions_Q: Tensor) -> Batch:
        """These positions of every row alone."""
        names = ("input_ids_BT", "labels_BT", "position_ids_BT", "segment_ids_BT")
        cut = {name: getattr(self, name)[:, positions_Q] for name in names}
        return replace(
            self,
            **cut,
            num_valid=int((cut["labels_BT"] != IGNORE).sum()),
            num_tokens=int((cut["segment_ids_BT"] >= 0).sum()),
            extras={**self.extras, SEGMENTS: self.segment_ids_BT},
        )


def _field(row: Any, name: str) -> Any:
    return row[name] if isinstance(row, dict) else getattr(row, name)


def collate(rows: Rows, indices: Sequence[int]) -> Batch:
    """Stack rows into a batch."""
    found = [rows[index] for index in indices]
    names = ("input_ids", "labels", "position_ids", "segment_ids")
    arrays = {
        name: np.stack([np.asarray(_field(row, name), dtype=np.int64) for row in found]) for name in names
    }
    return Batch(
        input_ids_BT=torch.from_numpy(arrays["input_ids"]),
        labels_BT=torch.from_numpy(arrays["labels"]),
        position_ids_BT=torch.from_numpy(arrays["position_ids"]),
        segment_ids_BT=torch.from_numpy(arrays["segment_ids"]),
        num_valid=int((arrays["labels"] != IGNORE).sum()),
        num_tokens=int((arrays["segment_ids"] >= 0).sum()),
        rows=tuple(indices),
    )


def row_at(consumed: int, *, seed: int, num_rows: int) -> int:
    """Which row follows after ``consumed`` rows; each epoch has its own order."""
    epoch, position = divmod(consumed, num_rows)
    return row_index(seed, epoch, position, num_rows)


def step_rows(
    step: int, *, batch_size: int, seed: int, num_rows: int, changes_by_epoch: bool = False
) -> list[int]:
    """The rows of an optimizer step; a step may reach over the end of an epoch.

    Where rows change by epoch, row r of epoch e has the number ``e * num_rows + r``.
    """
    first = step * batch_size
    rows = [row_at(first + offset, seed=seed, num_rows=num_rows) for offset in range(batch_size)]
    if not changes_by_epoch:
        return rows
    return [(first + offset) // num_rows * num_rows + row for offset, row in enumerate(rows)]


def as_rows(
    dataset: Any,
    *,
    split: str,
    sequence_length: int,
    packing: bool,
    seed: int,
    truncate: bool,
    fim: FimSection | None = None,
) -> Rows | None:
    """Packed rows of a Hearth dataset, of one split of it, or rows as they are. None stays None."""
    if dataset is None:
        return None
    if hasattr(dataset, "split") and callable(dataset.split):
        dataset = dataset.split(split)
    if hasattr(dataset, "tokens") and hasattr(dataset, "lengths"):
        from hearth.data import PackedRows

        rows: Rows = PackedRows(
            dataset, sequence_length, packing=packing, seed=seed, truncate=truncate, fim=fim
        )
        return rows
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{type(dataset).__name__} is no dataset",
            fix="give a hearth.data.Dataset, one split of it, or a sequence of packed rows",
        )
    given: Rows = dataset
    return given


def fingerprint_of(dataset: Any, rows: Rows) -> str:
    """The dataset's own fingerprint; for plain rows a hash of their number and of evenly spaced ones."""
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    digest = hashlib.sha256(str(len(rows)).encode())
    for index in np.unique(np.linspace(0, len(rows) - 1, _FINGERPRINT_ROWS).astype(int)).tolist():
        row = rows[index]
        parts = getattr(row, "parts", None)  # a sample
        pairs = [(_field(row, "input_ids"), _field(row, "labels"))] if parts is None else parts
        for values in itertools.chain.from_iterable(pairs):  # tokens, and what counts of them
            digest.update(np.asarray(values, dtype="<i8").tobytes())
        digest.update(str(getattr(row, "label", "")).encode())
    return f"rows-{digest.hexdigest()[:32]}"


def describe_row(rows: Rows, index: int) -> str:
    """The documents in a row, for messages: where to look when a row breaks training."""
    plan, split = getattr(rows, "plan", None), getattr(rows, "split", None)
    if plan is None or split is None:
        return f"row {index}"
    first, last = (int(at) for at in plan.row_starts[index % len(rows) :][:2])
    documents = list(dict.fromkeys(int(document) for document in plan.documents[first:last]))
    names = []
    for document in documents[:5]:
        info = split.document_info(document)
        fields = info if isinstance(info, dict) else vars(info)
        known = [str(fields[key]) for key in ("source", "path", "id") if fields.get(key)]
        names.append(f"document {document} ({', '.join(known)})" if known else f"document {document}")
    more = f" and {len(documents) - 5} more" if len(documents) > 5 else ""
    return f"row {index}: {'; '.join(names)}{more}"
