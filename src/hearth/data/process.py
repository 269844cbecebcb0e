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
from hearth.data.chat import (
    check_mask,
    last_turn,
    prompt_is_prefix,
    render_conversation,
    supervises_empty_thought,
)
from hearth.data.filters import (
    chat_key,
    filter_chat,
    filter_sample,
    filter_text,
    sample_key,
    split_hash,
    text_key,
)
from hearth.data.parse import BadInput, Document, ParseOptions, parse
from hearth.data.samples import Sample
from hearth.data.sources import RawDocument
from hearth.data.template import Message
from hearth.data.tokenizer import DataTokenizer
from hearth.errors import DataError

Rendered = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], str]  # tokens, loss mask, text

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
    part_lengths: list[tuple[int, ...]] = field(default_factory=list)  # tokens of each part of a document
    records: list[dict[str, Any]] = field(default_factory=list)  # source, id, messages of a conversation
    num_round_trips: int = 0
    num_lossy: int = 0
    num_turns: int = 0
    num_prefix_checks: int = 0
    num_prefix_mismatches: int = 0
    num_empty_thoughts: int = 0

    def add_counts(self, other: TokenResult) -> None:
        """Add what another batch has counted."""
        self.num_round_trips += other.num_round_trips
        self.num_lossy += other.num_lossy
        self.num_turns += other.num_turns
        self.num_prefix_mismatches += other.num_prefix_mismatches
        self.num_empty_thoughts += other.num_empty_thoughts


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
            group = document.group
            if document.sample is not None:
                reason = filter_sample(document.sample, self.options.control_tokens)
                key = sample_key(document.sample)
                # All answers to one prompt go into one split.
                group = group or chat_key(document.sample.prompt).hex()
            elif document.messages is not None:
                reason = filter_chat(document.messages, self.options.control_tokens)
                key = chat_key(document.messages)
            else:
                reason, key = filter_text(document.text, self.options.filters), text_key(document.text)
            size = sum(len(turn["content"].encode()) for turn in document.turns)
            size += len(document.text.encode())
            reasons.append(reason)
            keys.append(key)
            hashes.append(split_hash(self.options.seed, group or key.hex()))
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
            document.text or "\n".join(message["content"] for message in document.turns)
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
    plain = iter(tokenizer.encode_texts([document.text for document in documents if not document.turns]))
    for document in documents:
        record: dict[str, Any] = {"source": document.source, "id": document.id}
        if document.sample is not None:
            parts = _render_sample(document.sample, document.id, tokenizer, result)
            record |= {
                "messages": document.sample.prompt,
                "completions": document.sample.completions,
                "fields": document.sample.fields,
            }
        elif document.messages is not None:
            parts = [_render_conversation(document.messages, document.id, tokenizer, result)]
            record["messages"] = document.messages
        else:
            ids = next(plain)
            if not result.num_round_trips:
                result.num_round_trips, result.num_lossy = 1, int(tokenizer.decode(ids) != document.text)
            tokens = np.array([*tokenizer.prefix_ids, *ids, tokenizer.eos_id], dtype=np.int32)
            parts = [(tokens, np.ones(len(tokens), dtype=np.bool_), document.text)]
        result.tokens.append(np.concatenate([tokens for tokens, _, _ in parts]))
        result.masks.append(np.concatenate([mask for _, mask, _ in parts]))
        result.part_lengths.append(tuple(len(tokens) for tokens, _, _ in parts))
        result.num_bytes.append(sum(len(text.encode()) for _, _, text in parts))
        result.records.append(record)
    return result


def _render_conversation(
    messages: Sequence[Message], where: str, tokenizer: DataTokenizer, result: TokenResult
) -> Rendered:
    try:
        tokens, mask, text = render_conversation(messages, tokenizer)
    except DataError as error:
        raise DataError(f"{where}: {error.message}", fix=error.fix) from error
    result.num_turns += check_mask(tokens, mask, messages, tokenizer, where)
    result.num_empty_thoughts += supervises_empty_thought(text, tokens, mask, messages, tokenizer)
    if result.num_prefix_checks < NUM_PREFIX_CHECKS:
        result.num_prefix_checks += 1
        result.num_prefix_mismatches += not prompt_is_prefix(messages, tokens, tokenizer)
    return tokens, mask, text


def _render_sample(
    sample: Sample, where: str, tokenizer: DataTokenizer, result: TokenResult
) -> list[Rendered]:
    """The prompt with each answer, of which the last turn counts; or the prompt alone, to be answered."""
    if not sample.completions:
        text, _ = tokenizer.template.render(sample.prompt, add_generation_prompt=True)
        ids = np.asarray(tokenizer.encode_rendered(text)[0], dtype=np.int32)
        return [(ids, np.zeros(len(ids), dtype=np.bool_), text)]
    parts = []
    for completion in sample.completions:
        messages = [*sample.prompt, completion]
        tokens, mask, text = _render_conversation(messages, where, tokenizer, result)
        parts.append((tokens, last_turn(mask), text))
    return parts


def record_line(record: dict[str, Any], num_bytes: int, start: int, stop: int) -> bytes:
    """One line of ``documents.jsonl``."""
    record = {**record, "bytes": num_bytes, "start": start, "stop": stop}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
