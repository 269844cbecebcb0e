"""Fill in the middle: texts rearranged so that a left-to-right model learns to write what lies between.

After Bavarian et al. 2022, "Efficient training of language models to fill in the middle". A text is cut at
two places into prefix, middle and suffix, and read as

    PSM   <PRE> prefix <SUF> suffix <MID> middle
    SPM   <PRE> <SUF> suffix <MID> prefix middle        (the paper's variant that trains jointly with PSM)

with whatever begins every text (BOS) before it, and its end token after the middle: that is what tells a
model where a hole ends.

Cuts fall between any two characters, not between tokens, as the paper recommends: at inference the cursor
stands wherever it stands, often inside a token. What is not a whole text, a piece of one that was longer than
a row, is rearranged by itself, so no rearranged text is ever torn. Re-encoding the parts takes a few tokens
more than the text had; rows are planned with ``reserve`` tokens of room for them. Which cuts are drawn
depends on nothing but (seed, epoch, document, first token), so a resumed run reads the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hearth.config.recipe import FimSection
from hearth.data.tokenizer import DataTokenizer
from hearth.errors import DataError

# Put into a tokenizer that is trained here; the names of Qwen2.5-Coder and CodeGemma.
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")

# Prefix, suffix and middle of the families, and what ends a middle where that is not the eos token.
FAMILIES: dict[str, tuple[str, str, str, str | None]] = {
    "Qwen2.5-Coder, CodeGemma": (*FIM_TOKENS, None),
    "StarCoder, Granite": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", None),
    "SantaCoder": ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", None),
    "CodeLlama": ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    "DeepSeek-Coder": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", None),  # noqa: RUF001
}

# Tokens that re-encoding may add. Measured on Python source with a vocabulary of 8,192: 99 % of the cuts need
# no more; the others are drawn again.
_SLACK = 6
_ATTEMPTS = 8

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class FimTokens:
    """Ids of the marks."""

    prefix: int
    suffix: int
    middle: int
    end: tuple[int, ...]

    @classmethod
    def find(cls, tokenizer: DataTokenizer) -> FimTokens:
        """Those of the family that the tokenizer belongs to. Raises DataError when it has none."""
        for prefix, suffix, middle, end in FAMILIES.values():
            ids = [tokenizer.backend.token_to_id(token) for token in (prefix, suffix, middle)]
            found = [index for index in ids if index is not None]
            if len(found) == len(ids):
                last = None if end is None else tokenizer.backend.token_to_id(end)
                return cls(found[0], found[1], found[2], () if last is None else (last,))
        known = "; ".join(f"{family}: {tokens[0]}" for family, tokens in FAMILIES.items())
        raise DataError(
            f"data.fim needs a tokenizer with tokens for prefix, suffix and middle, which "
            f"{tokenizer.directory or 'this one'} does not have (known are {known})",
            fix="start from a code model that has them, train a tokenizer (leave tokenizer.base and "
            "model.base out, and prepare the data with data.fim), or leave data.fim out",
        )


class FillInTheMiddle:
    """Rearranges pieces of text. ``reserve`` is how many tokens longer than before a piece may become."""

    def __init__(self, section: FimSection, tokenizer: DataTokenizer, *, seed: int) -> None:
        self.section, self.seed = section, seed
        self._tokenizer = tokenizer
        self._marks = FimTokens.find(tokenizer)
        self._num_marks = 3 + len(self._marks.end)
        self.reserve = self._num_marks + _SLACK
        x_ids, y_ids = tokenizer.encode_texts(["x", "y"])
        # SentencePiece begins every text with a space of its own, so parts encoded apart would gain spaces.
        self.at_characters = tokenizer.decode([*x_ids, *y_ids]) == "xy"

    def apply(self, tokens: Tokens, *, epoch: int, document: int, start: int, is_end: bool) -> Tokens:
        """The piece that begins at token ``start`` of a document, rearranged or as it is.

        ``is_end`` says that its last token is the end of the document, which then stays last. What comes
        before every text stays first.
        """
        draw = _Draw(f"{self.seed}/{epoch}/{document}/{start}")
        if draw.uniform() >= self.section.rate:
            return tokens
        suffix_first = draw.uniform() < self.section.spm_rate
        head = len(self._tokenizer.prefix_ids) if start == 0 else 0
        tail = len(tokens) - 1 if is_end else len(tokens)
        body = tokens[head:tail].tolist()
        if not body:
            return tokens
        parts = self._parts_of_text(body, draw, suffix_first) if self.at_characters else None
        if parts is None:
            first, second = sorted((draw.below(len(body) + 1), draw.below(len(body) + 1)))
            parts = [body[:first], body[first:second], body[second:]]
        prefix, middle, suffix = parts
        marks = self._marks
        if suffix_first:
            rearranged = [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix, *middle]
        else:
            rearranged = [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle, *middle]
        return np.array(
            [*tokens[:head].tolist(), *rearranged, *marks.end, *tokens[tail:].tolist()], dtype=np.int32
        )

    def _parts_of_text(self, body: Sequence[int], draw: _Draw, suffix_first: bool) -> list[list[int]] | None:
        """Prefix, middle and suffix cut between characters; None where that takes too many tokens.

        Read suffix first, prefix and middle follow one another, so they are encoded as one.
        """
        text = self._tokenizer.decode(body)
        if "\N{REPLACEMENT CHARACTER}" in text:
            return None  # a piece that begins or ends inside a character
        for _ in range(_ATTEMPTS):
            first, second = sorted((draw.below(len(text) + 1), draw.below(len(text) + 1)))
            if suffix_first:
                middle, suffix = self._tokenizer.encode_texts([text[:second], text[second:]])
                parts = [[], middle, suffix]
            else:
                parts = self._tokenizer.encode_texts([text[:first], text[first:second], text[second:]])
            if sum(map(len, parts)) <= len(body) + _SLACK:
                return parts
        return None


class _Draw:
    """Numbers that depend on a key alone."""

    def __init__(self, key: str) -> None:
        self._key, self._count = key, 0

    def _next(self) -> int:
        data = f"{self._key}/{self._count}".encode()
        self._count += 1
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"hearth.fim").digest(), "little")

    def uniform(self) -> float:
        """In [0, 1)."""
        return self._next() / 2.0**64

    def below(self, limit: int) -> int:
        """One of 0 … limit - 1."""
        return self._next() * limit >> 64
