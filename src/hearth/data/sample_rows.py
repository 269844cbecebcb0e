"""Samples one by one, for objectives that count comparisons, verdicts or prompts instead of packed rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hearth.data.dataset import TokenSplit
from hearth.data.manifest import SAMPLE_PARTS
from hearth.errors import DataError

Part = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]


class SampleRows:
    """The samples of a split whose parts all fit into ``max_length`` positions, by number.

    A part of n tokens takes n - 1 positions: its last token is only a target. What is longer is dropped and
    counted. With ``truncate``, the beginning of its prompt is cut away instead, by the same number of tokens
    in every part (what the tokenizer puts before a text, such as BOS, stays). Answers are never cut: without
    its end an answer has no stop token, and a comparison would be between other answers than those that were
    judged. So a sample whose answer alone is too long is dropped even then.

    ``documents`` [rows] are the documents behind the rows, ``cuts`` [rows] the tokens cut from each.
    """

    def __init__(self, split: TokenSplit, max_length: int, *, truncate: bool = False) -> None:
        if split.kind not in SAMPLE_PARTS:
            raise DataError(
                f"{split.dataset.path} holds {split.kind}, not samples",
                fix=f"prepare it with data.sources[].format: {', '.join(SAMPLE_PARTS)}",
            )
        self.split, self.max_length = split, max_length
        self.part_names = SAMPLE_PARTS[split.kind]
        self._num_kept = len(split.dataset.tokenizer().prefix_ids) if truncate else 0
        excess = split.part_lengths.max(axis=1, initial=0) - (max_length + 1)
        cuts = np.maximum(excess, 0)
        fits = excess <= 0
        if truncate:
            for index in np.flatnonzero(~fits):
                fits[index] = self._shortest_prompt(int(index)) - self._num_kept > cuts[index]
        self.documents: npt.NDArray[np.int64] = np.flatnonzero(fits).astype(np.int64)
        self.cuts: npt.NDArray[np.int64] = cuts[self.documents].astype(np.int64)
        self.num_dropped = int((~fits).sum())
        self.num_truncated = int((self.cuts > 0).sum())
        if len(fits) and not fits.any():
            raise DataError(
                f"none of the {len(fits)} samples in the {split.name} split of {split.dataset.path} fits "
                f"into {max_length} tokens; the shortest needs {int(excess.min()) + max_length}",
                fix="raise data.sequence_length" + ("" if truncate else ", or set data.truncate"),
            )

    def _shortest_prompt(self, index: int) -> int:
        """Tokens before the first that counts; of a prompt without an answer, all but its last."""
        lengths = []
        for tokens, mask in self.split.parts(index):
            counted = np.flatnonzero(mask)
            lengths.append(int(counted[0]) if len(counted) else len(tokens) - 1)
        return min(lengths)

    def __len__(self) -> int:
        return len(self.documents)

    def parts(self, row: int) -> list[Part]:
        """Token ids and loss mask of each part of a sample."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        parts, cut = self.split.parts(int(self.documents[row])), int(self.cuts[row])
        if not cut:
            return parts
        keep = self._num_kept
        return [
            (np.delete(tokens, slice(keep, keep + cut)), np.delete(mask, slice(keep, keep + cut)))
            for tokens, mask in parts
        ]
