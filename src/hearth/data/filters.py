"""Basic quality filters, the key of exact deduplication, and the split: pure functions of one document."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hearth.config.recipe import FilterSection
from hearth.data.samples import Sample
from hearth.data.template import Message

# Why a document is not in the dataset; the position is the code that the scan records.
REASONS = (
    "kept",
    "min_chars",
    "max_chars",
    "max_line_chars",
    "min_alphabetic",
    "max_duplicate_lines",
    "no_answer",  # chat: no assistant's turn, or only empty ones
    "control_tokens",  # chat: the text of a message spells a control token of the template
    "duplicate",
    "equal_answers",  # preference: chosen and rejected are the same
    "prompts_differ",  # preference: chosen and rejected answer different conversations
)
KEPT = 0
DUPLICATE = REASONS.index("duplicate")


def filter_text(text: str, filters: FilterSection) -> int:
    """Code of the first filter that drops the text, or KEPT.

    Letters are counted among the characters that are not whitespace; lines are compared without the
    whitespace around them.
    """
    if len(text) < filters.min_chars:
        return REASONS.index("min_chars")
    if filters.max_chars is not None and len(text) > filters.max_chars:
        return REASONS.index("max_chars")
    if filters.max_line_chars is not None and max(map(len, text.split("\n"))) > filters.max_line_chars:
        return REASONS.index("max_line_chars")
    if filters.min_alphabetic > 0:
        visible = "".join(text.split())
        if sum(map(str.isalpha, visible)) < filters.min_alphabetic * len(visible):
            return REASONS.index("min_alphabetic")
    if filters.max_duplicate_lines < 1:
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        if len(lines) - len(set(lines)) > filters.max_duplicate_lines * len(lines):
            return REASONS.index("max_duplicate_lines")
    return KEPT


def filter_chat(messages: Sequence[Message], control_tokens: Sequence[str]) -> int:
    """Code of the reason to leave a conversation out, or KEPT."""
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return REASONS.index("no_answer")
    if any(token in message["content"] for message in messages for token in control_tokens):
        return REASONS.index("control_tokens")
    return KEPT


def filter_sample(sample: Sample, control_tokens: Sequence[str]) -> int:
    """Code of the reason to leave a comparison, a verdict or a prompt out, or KEPT."""
    if not all(message["content"].strip() for message in sample.completions):
        return REASONS.index("no_answer")
    if sample.defect:
        return REASONS.index(sample.defect)
    turns = [*sample.prompt, *sample.completions]
    if any(token in message["content"] for message in turns for token in control_tokens):
        return REASONS.index("control_tokens")
    return KEPT


def normalise(text: str) -> str:
    """What deduplication compares: NFC, without trailing whitespace on lines or blank lines at the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return "\n".join(map(str.rstrip, text.strip().split("\n")))


def text_key(text: str) -> bytes:
    """16 bytes that two texts share exactly when they are equal after ``normalise``."""
    return hashlib.blake2b(normalise(text).encode(), digest_size=16, person=b"hearth.text").digest()


def chat_key(messages: Sequence[Message]) -> bytes:
    """16 bytes that two conversations share when their roles and normalised contents are equal."""
    return _key(_turns(messages), b"hearth.chat")


def sample_key(sample: Sample) -> bytes:
    """16 bytes that two samples share when prompt, answers and fields are equal."""
    parts = [_turns(sample.prompt), _turns(sample.completions), sample.fields]
    return _key(parts, b"hearth.sample")


def _turns(messages: Sequence[Message]) -> list[list[str]]:
    return [[message["role"], normalise(message["content"])] for message in messages]


def _key(value: object, person: bytes) -> bytes:
    data = json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    return hashlib.blake2b(data, digest_size=16, person=person).digest()


def split_hash(seed: int, group: str) -> int:
    """Uniform 64-bit number of a group of documents; below a threshold the group is held out.

    It depends on nothing else, so adding documents never moves the others.
    """
    digest = hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=8, person=b"hearth.split").digest()
    return int.from_bytes(digest, "little")


def held_out(hashes: npt.NDArray[np.uint64], fraction: float) -> tuple[npt.NDArray[np.bool_], bool]:
    """Which documents are held out, by the split hashes of their groups, and whether by the fallback.

    When no group falls below the threshold, which happens with few documents, the group with the smallest
    hash is held out, so that a validation split that was asked for is never empty.
    """
    if fraction <= 0 or not len(hashes):
        return np.zeros(len(hashes), dtype=np.bool_), False
    if fraction >= 1:
        return np.ones(len(hashes), dtype=np.bool_), False
    chosen = hashes < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))
    if chosen.any():
        return chosen, False
    return hashes == hashes.min(), True


def first_occurrences(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """True for the first row of each distinct key; ``keys`` is [N, 16]."""
    first = np.zeros(len(keys), dtype=np.bool_)
    if len(keys):
        packed = np.ascontiguousarray(keys).view("V16").ravel()
        # Void arrays do not sort; a structured view of two integers does.
        pairs = packed.view([("high", "<u8"), ("low", "<u8")])
        order = np.lexsort((np.arange(len(pairs)), pairs["low"], pairs["high"]))
        ranked = pairs[order]
        is_new = np.ones(len(ranked), dtype=np.bool_)
        is_new[1:] = ranked[1:] != ranked[:-1]
        first[order[is_new]] = True
    return first
