"""The pack plan: which piece of which document goes into which row. Pure and deterministic.

A document of n tokens gives n - 1 pairs (input token, next token); its last token is never an input. A row
holds ``sequence_length`` pairs. Pieces are placed by best-fit decreasing, computed on the histogram of
lengths instead of on the pieces (Krell et al. 2021, "Efficient sequence packing without
cross-contamination"): pieces of one length are interchangeable, so the search costs some multiple of the row
length, whatever the number of documents, and only handing the real pieces to their slots is linear in it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hearth.errors import ConfigError

Int64Array = npt.NDArray[np.int64]
TooLong = Literal["cut", "drop", "truncate"]
Composition = tuple[tuple[int, int], ...]  # (length, how many pieces of it) of one row

WINDOW = 1 << 20


@dataclass(frozen=True)
class PackPlan:
    """Segments in row order. Row r holds the segments ``row_starts[r]:row_starts[r + 1]``.

    Segment s reads the tokens ``starts[s] … starts[s] + lengths[s]`` of document ``documents[s]``, both ends
    included: the first ``lengths[s]`` are inputs, the last ``lengths[s]`` are their targets.
    """

    sequence_length: int
    row_starts: Int64Array
    documents: Int64Array
    starts: Int64Array
    lengths: Int64Array
    num_dropped: int
    num_truncated: int
    num_cut_tokens: int
    num_too_short: int

    @property
    def num_rows(self) -> int:
        """Rows of the plan."""
        return len(self.row_starts) - 1

    @property
    def num_pairs(self) -> int:
        """Pairs of input and target over all rows: tokens trained on in one epoch."""
        return int(self.lengths.sum())

    @property
    def efficiency(self) -> float:
        """Share of the positions that hold a token; the rest is padding. 1.0 for a plan without rows."""
        capacity = self.num_rows * self.sequence_length
        return self.num_pairs / capacity if capacity else 1.0

    @property
    def padding(self) -> float:
        """Share of the positions that are padding."""
        return 1.0 - self.efficiency

    @classmethod
    def build(
        cls,
        lengths: npt.ArrayLike,
        sequence_length: int,
        *,
        packing: bool = True,
        seed: int = 0,
        too_long: TooLong = "cut",
        always_cut: npt.ArrayLike | None = None,
        reserve: int = 0,
        window: int = WINDOW,
    ) -> PackPlan:
        """Plan the rows for documents of ``lengths`` tokens.

        ``too_long`` says what happens to a document that does not fit in one row: ``cut`` it into
        consecutive pieces (nothing is lost), ``drop`` it, or ``truncate`` it to the first row. Documents
        marked in ``always_cut`` [documents] are cut whatever it says. Documents of fewer than two tokens
        have no pair and are counted in ``num_too_short``. Pieces are shuffled by ``seed`` and packed in
        windows of ``window`` pieces. ``reserve`` positions are kept free for every piece to grow into.
        Raises ConfigError when a row has no room.
        """
        if sequence_length < 1:
            raise ConfigError(
                f"data.sequence_length is {sequence_length}; it must be at least 1",
                fix="give the number of tokens of one training row, such as 512",
            )
        if reserve >= sequence_length:
            raise ConfigError(
                f"data.sequence_length is {sequence_length}; data.fim alone takes {reserve} tokens of a row",
                fix="give at least a few dozen tokens",
            )
        capacity = sequence_length - reserve
        pairs = np.asarray(lengths, dtype=np.int64) - 1
        too_many = pairs > capacity
        if always_cut is not None:
            too_many &= ~np.asarray(always_cut, dtype=np.bool_)
        if too_long == "drop":
            fitting = np.where(too_many, 0, pairs)
        elif too_long == "truncate":
            fitting = np.where(too_many, capacity, pairs)
        else:
            fitting = pairs
        documents, starts, sizes = _pieces(np.maximum(fitting, 0), capacity)
        if packing:
            order, row_starts = _pack(sizes + reserve, sequence_length, seed, window)
        else:
            order, row_starts = np.arange(len(sizes)), np.arange(len(sizes) + 1)
        return cls(
            sequence_length=sequence_length,
            row_starts=row_starts.astype(np.int64),
            documents=documents[order],
            starts=starts[order],
            lengths=sizes[order],
            num_dropped=int(too_many.sum()) if too_long == "drop" else 0,
            num_truncated=int(too_many.sum()) if too_long == "truncate" else 0,
            num_cut_tokens=(int((pairs[too_many] - capacity).sum()) if too_long == "truncate" else 0),
            num_too_short=int((pairs < 1).sum()),
        )


def _pieces(pairs: Int64Array, sequence_length: int) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Document, first token and number of pairs of each piece, in document order."""
    num_pieces = -(-pairs // sequence_length)
    documents = np.repeat(np.arange(len(pairs), dtype=np.int64), num_pieces)
    first_piece = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    starts = (np.arange(len(documents), dtype=np.int64) - first_piece) * sequence_length
    return documents, starts, np.minimum(pairs[documents] - starts, sequence_length)


def _pack(sizes: Int64Array, capacity: int, seed: int, window: int) -> tuple[Int64Array, Int64Array]:
    """Order of the pieces by row, and where each row starts in it."""
    shuffled = np.random.Generator(np.random.Philox(key=seed % (1 << 64))).permutation(len(sizes))
    orders: list[Int64Array] = []
    counts: list[Int64Array] = [np.zeros(1, dtype=np.int64)]
    for first in range(0, len(shuffled), window):
        members = shuffled[first : first + window]
        order, rows = _pack_window(sizes[members], capacity)
        orders.append(members[order])
        counts.append(np.bincount(rows))
    order = np.concatenate(orders) if orders else np.zeros(0, dtype=np.int64)
    return order, np.cumsum(np.concatenate(counts))


def _pack_window(sizes: Int64Array, capacity: int) -> tuple[Int64Array, Int64Array]:
    """Pieces of one window ordered by row, and the row of each."""
    by_length = np.argsort(sizes, kind="stable")
    histogram = np.bincount(sizes, minlength=capacity + 1)
    taken = np.cumsum(histogram) - histogram  # where the unused pieces of each length start in by_length
    pieces: list[Int64Array] = []
    rows: list[Int64Array] = []
    first_row = 0
    for composition, num_rows in best_fit_decreasing(histogram.tolist(), capacity):
        row_range = np.arange(first_row, first_row + num_rows, dtype=np.int64)
        for length, count in composition:
            begin = int(taken[length])
            pieces.append(by_length[begin : begin + num_rows * count])
            rows.append(np.repeat(row_range, count))
            taken[length] += num_rows * count
        first_row += num_rows
    piece_order = np.concatenate(pieces)
    row_order = np.concatenate(rows)
    in_row_order = np.argsort(row_order, kind="stable")
    return piece_order[in_row_order], row_order[in_row_order]


def best_fit_decreasing(histogram: list[int], capacity: int) -> list[tuple[Composition, int]]:
    """Rows, as (composition, number of rows like it), that hold ``histogram[length]`` pieces of each length.

    The same rows as best-fit decreasing over the single pieces: longest first, each into the fullest row
    that still takes it, a new row where none does.
    """
    open_rows: dict[int, list[tuple[Composition, int]]] = {capacity: []}  # by free space
    free_spaces: list[int] = []  # the keys of open_rows that have rows, ascending

    def add(free: int, composition: Composition, num_rows: int) -> None:
        if num_rows:
            if not open_rows.get(free):
                open_rows[free] = []
                bisect.insort(free_spaces, free)
            open_rows[free].append((composition, num_rows))

    for length in range(capacity, 0, -1):
        remaining = histogram[length]
        while remaining:
            composition: Composition = ()
            at = bisect.bisect_left(free_spaces, length)
            if at == len(free_spaces):
                free, available = capacity, remaining
            else:
                free = free_spaces[at]
                composition, available = open_rows[free].pop()
                if not open_rows[free]:
                    free_spaces.pop(at)
            per_row = free // length
            num_full = min(available, remaining // per_row)
            add(free - per_row * length, (*composition, (length, per_row)), num_full)
            remaining -= num_full * per_row
            num_left = available - num_full
            if num_left and remaining:
                add(free - remaining * length, (*composition, (length, remaining)), 1)
                remaining, num_left = 0, num_left - 1
            if composition:
                add(free, composition, num_left)
    return [rows for free in sorted(open_rows) for rows in open_rows[free]]
