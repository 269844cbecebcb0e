"""What a worker does with a batch of raw documents: scan it, take its texts, or tokenise it.

Each method depends on its arguments and the options alone, so results do not depend on which worker, or how
many, did the work. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hearth.config.recipe import FilterSection
from hearth.data.chat import check_mask, prompt_is_prefix, render_conversation
from hearth.data.filters import chat_key, filter_chat, filter_text, split_hash, text_key
from hearth.data.parse import BadInput, Document, ParseOptions, parse
from hearth.data.sources import RawDocument
from hearth.data.tokenizer import DataTokenizer
from hearth.errors import DataError

DROP = 255  # decision for a document that is in no split
NUM_PREFIX_CHECKS = 4  # conversations of a batch whose prompt is compared with serving's


@dataclass(frozen=True)
class ProcessOptions:
    """All that decides which documents are kept."""

    sources: tuple[ParseOptions, ...]
    filters: FilterSection
    fail_on_bad_file: bool
    seed: int
    control_tokens: tuple[str, ...]


@dataclass
class ScanResult:
    """Per document of a batch, in order; ``bad`` holds (source, reason, message)."""

    sources: npt.NDArray[np.int32]
    reasons: npt.NDArray[np.uint8]
    keys: npt.NDArray[np.uint8]  # [N, 16]
    split_hashes: npt.NDArray[np.uint64]
    num_bytes: npt.NDArray[np.int64]
    bad: list[tuple[int, str, str]]


@dataclass
class TokenResult:
    """The tokens of the documents of one batch that go into one split, in order."""

    tokens: list[npt.NDArray[np.int32]] = field(default_factory=list)
    masks: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)  # source, id, messages of a conversation
    num_round_trips: int = 0
    num_lossy: int = 0
    num_turns: int = 0
    num_prefix_checks: int = 0
    num_prefix_mismatches: int = 0


class BatchProcessor:
    """Holds the options and, once it is known, the tokenizer."""

    def __init__(self, options: ProcessOptions) -> None:
        self.options = options
        self._tokenizer: DataTokenizer | None = None

    def load_tokenizer(self, directory: str) -> None:
        """Open the tokenizer that ``tokenize`` uses."""
        self._tokenizer = DataTokenizer.open(Path(directory))

    def _parse(self, batch: Sequence[RawDocument]) -> tuple[list[Document], list[tuple[int, str, str]]]:
        documents: list[Document] = []
        bad: list[tuple[int, str, str]] = []
        for raw in batch:
            try:
                documents.extend(parse(raw, self.options.sources))
            except BadInput as error:
                if self.options.fail_on_bad_file:
                    raise DataError(
                        error.message,
                        fix="remove or convert the file, or set data.on_bad_file to skip",
                    ) from error
                bad.append((raw.source, error.reason, error.message))
        return documents, bad

    def scan(self, batch: Sequence[RawDocument]) -> ScanResult:
        """Filter, hash and measure the documents of a batch."""
        documents, bad = self._parse(batch)
        reasons, keys, hashes, sizes = [], [], [], []
        for document in documents:
            if document.messages is None:
                reason, key = filter_text(document.text, self.options.filters), text_key(document.text)
                size = len(document.text.encode())
            else:
                reason = filter_chat(document.messages, self.options.control_tokens)
                key = chat_key(document.messages)
                size = sum(len(message["content"].encode()) for message in document.messages)
            reasons.append(reason)
            keys.append(key)
            hashes.append(split_hash(self.options.seed, document.group or key.hex()))
            sizes.append(size)
        return ScanResult(
            sources=np.array([document.source for document in documents], dtype=np.int32),
            reasons=np.array(reasons, dtype=np.uint8),
            keys=np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16),
            split_hashes=np.array(hashes, dtype=np.uint64),
            num_bytes=np.array(sizes, dtype=np.int64),
            bad=bad,
        )

    def texts(self, batch: Sequence[RawDocument], wanted: npt.NDArray[np.bool_]) -> list[str]:
        """The texts of the wanted documents; a conversation gives the contents of its messages."""
        documents, _ = self._parse(batch)
        check_unchanged(len(documents), len(wanted))
        return [
            document.text
            if document.messages is None
            else "\n".join(message["content"] for message in document.messages)
            for document, take in zip(documents, wanted, strict=True)
            if take
        ]

    def tokenize(
        self, batch: Sequence[RawDocument], decisions: npt.NDArray[np.uint8], num_splits: int
    ) -> list[TokenResult]:
        """Tokens per split; ``decisions`` holds the split of each document, or DROP."""
        assert self._tokenizer is not None
        documents, _ = self._parse(batch)
        check_unchanged(len(documents), len(decisions))
        results = []
        for split in range(num_splits):
            chosen = [document for document, to in zip(documents, decisions, strict=True) if to == split]
            results.append(_tokenize(chosen, self._tokenizer))
        return results


def check_unchanged(num_now: int, num_before: int) -> None:
    """Raise DataError when another pass over the sources finds another number of things."""
    if num_now != num_before:
        raise DataError(
            f"the sources changed while they were read: {num_before} documents before, {num_now} now",
            fix="run it again when nothing writes to them",
        )


def _tokenize(documents: list[Document], tokenizer: DataTokenizer) -> TokenResult:
    result = TokenResult()
    plain = iter(
        tokenizer.encode_texts([document.text for document in documents if document.messages is None])
    )
    for document in documents:
        if document.messages is None:
            ids = next(plain)
            if not result.num_round_trips:
                result.num_round_trips, result.num_lossy = 1, int(tokenizer.decode(ids) != document.text)
            tokens = np.array([*tokenizer.prefix_ids, *ids, tokenizer.eos_id], dtype=np.int32)
            result.tokens.append(tokens)
            result.masks.append(np.ones(len(tokens), dtype=np.bool_))
            result.num_bytes.append(len(document.text.encode()))
        else:
            tokens, mask, text = render_conversation(document.messages, tokenizer)
            result.num_turns += check_mask(tokens, mask, document.messages, tokenizer, document.id)
            if result.num_prefix_checks < NUM_PREFIX_CHECKS:
                result.num_prefix_checks += 1
                result.num_prefix_mismatches += not prompt_is_prefix(document.messages, tokens, tokenizer)
            result.tokens.append(tokens)
            result.masks.append(mask)
            result.num_bytes.append(len(text.encode()))
        record: dict[str, Any] = {"source": document.source, "id": document.id}
        if document.messages is not None:
            record["messages"] = document.messages
        result.records.append(record)
    return result


def record_line(record: dict[str, Any], num_bytes: int, start: int, stop: int) -> bytes:
    """One line of ``documents.jsonl``."""
    record = {**record, "bytes": num_bytes, "start": start, "stop": stop}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
