"""Packed rows: what a training step reads. Computed from the memory-mapped tokens when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from hearth.config.recipe import FimSection
from hearth.data.dataset import TokenSplit
from hearth.data.fim import FillInTheMiddle
from hearth.data.manifest import SAMPLE_PARTS
from hearth.data.packing import PackPlan, TooLong
from hearth.errors import DataError

IGNORE = -100

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedRow:
    """One row of T positions.

    ``labels[t]`` is the token that follows ``input_ids[t]`` in the same document, or -100 where none counts.
    ``position_ids`` restart at 0 with every segment, padding included, so code that finds documents by their
    positions keeps the padding apart too. ``segment_ids`` number the segments of the row; padding has -1.
    """

    input_ids: Int64Array
    labels: Int64Array
    position_ids: Int64Array
    segment_ids: Int64Array


class PackedRows:
    """The rows of a split, by number; see ``hearth.data.order`` for the order to read them in.

    Text longer than a row is cut into consecutive pieces. Conversations longer than a row are dropped and
    counted in ``plan.num_dropped``, or with ``truncate`` cut off at the end of the row.

    With ``fim`` some texts are rearranged to be filled in, others in every epoch: row r of epoch e has the
    number ``e * len(rows) + r``. Conversations stay as they are.
    """

    def __init__(
        self,
        split: TokenSplit,
        sequence_length: int,
        packing: bool = True,
        seed: int = 0,
        *,
        truncate: bool = False,
        fim: FimSection | None = None,
    ) -> None:
        if split.kind in SAMPLE_PARTS:
            raise DataError(
                f"{split.dataset.path} holds {split.kind}; packed rows are made of texts or conversations",
                fix="use an objective for such samples, or prepare the data with format: chat or text",
            )
        self.split = split
        self.sequence_length = sequence_length
        self.fim = None if fim is None else FillInTheMiddle(fim, split.dataset.tokenizer(), seed=seed)
        too_long: TooLong = "cut"
        if split.is_chat:
            too_long = "truncate" if truncate else "drop"
        self.plan = PackPlan.build(
            split.lengths,
            sequence_length,
            packing=packing,
            seed=seed,
            too_long=too_long,
            always_cut=~split.conversations if split.is_chat else None,
            reserve=0 if self.fim is None else self.fim.reserve,
        )
        tokenizer = split.dataset.manifest.tokenizer
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(index for index in candidates if index is not None)

    def __len__(self) -> int:
        return self.plan.num_rows

    @property
    def changes_by_epoch(self) -> bool:
        """Whether a row is another one in the next epoch."""
        return self.fim is not None

    @property
    def identity(self) -> str:
        """What decides the rows beside the dataset, their length and their packing; a run resumes with it."""
        if self.fim is None:
            return ""
        section = self.fim.section
        return f"+fim({section.rate:g},{section.spm_rate:g},{self.fim.seed})"

    def segments(self, index: int) -> list[tuple[int, int, int]]:
        """(document, first token, number of inputs) of each segment of a row: its provenance.

        Of a rearranged text, the inputs before it was rearranged.
        """
        if self.changes_by_epoch and len(self):
            index %= len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        begin, end = int(self.plan.row_starts[index]), int(self.plan.row_starts[index + 1])
        plan = self.plan
        return [
            (int(plan.documents[s]), int(plan.starts[s]), int(plan.lengths[s])) for s in range(begin, end)
        ]

    def __getitem__(self, index: int) -> PackedRow:
        length = self.sequence_length
        row = PackedRow(
            input_ids=np.full(length, self.pad_id, dtype=np.int64),
            labels=np.full(length, IGNORE, dtype=np.int64),
            position_ids=np.zeros(length, dtype=np.int64),
            segment_ids=np.full(length, -1, dtype=np.int64),
        )
        at = 0
        for number, (document, start, count) in enumerate(self.segments(index)):
            tokens, mask = self.segment(index, document, start, count)
            count = len(tokens) - 1
            here = slice(at, at + count)
            row.input_ids[here] = tokens[:-1]
            row.labels[here] = tokens[1:] if mask is None else np.where(mask[1:], tokens[1:], IGNORE)
            row.position_ids[here] = np.arange(count)
            row.segment_ids[here] = number
            at += count
        row.position_ids[at:] = np.arange(length - at)
        return row

    def segment(
        self, index: int, document: int, start: int, count: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_] | None]:
        """The tokens of a segment of a row, and which of them count in the loss; None when all do."""
        tokens = self.split.token_range(document, start, start + count + 1)
        if self.fim is None or (self.split.is_chat and self.split.conversations[document]):
            return tokens, self.split.mask_range(document, start, start + count + 1)
        is_end = start + count + 1 == self.split.length(document)
        epoch = index // len(self)
        return self.fim.apply(tokens, epoch=epoch, document=document, start=start, is_end=is_end), None

    def batch(self, indices: Sequence[int]) -> dict[str, Int64Array]:
        """Rows stacked to [B, T] arrays under the names of ``PackedRow``."""
        rows = [self[index] for index in indices]
        return {
            field.name: np.stack([getattr(row, field.name) for row in rows]) for field in fields(PackedRow)
        }
