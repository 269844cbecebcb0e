"""The scan: which documents are kept, why the others are not, and which are held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hearth.data.filters import DUPLICATE, KEPT, REASONS, first_occurrences, held_out
from hearth.data.job import Job
from hearth.data.manifest import Count, SourceRecord
from hearth.data.process import DROP, ScanResult
from hearth.data.progress import Progress
from hearth.data.sources import read_batches
from hearth.data.workers import WorkerPool
from hearth.errors import DataError

SPLITS = ("train", "validation")
MAX_BAD_EXAMPLES = 20


@dataclass
class Corpus:
    """The decision on every document, in the order of reading."""

    decisions: npt.NDArray[np.uint8]  # index into SPLITS, or DROP
    num_bytes: npt.NDArray[np.int64]
    split_hashes: npt.NDArray[np.uint64]
    batch_starts: npt.NDArray[np.int64]  # documents of batch b: batch_starts[b]:batch_starts[b + 1]
    records: list[SourceRecord]
    split_fallback: bool

    def batches(self) -> Iterator[slice]:
        """The documents of each batch."""
        for start, stop in zip(self.batch_starts[:-1], self.batch_starts[1:], strict=True):
            yield slice(int(start), int(stop))


def scan_corpus(job: Job, pool: WorkerPool, clock: Progress) -> Corpus:
    results: list[ScanResult] = []
    sizes: list[int] = []
    records = [
        SourceRecord(
            path=source.section.path,
            format=source.format,
            license=source.license,
            files=len(source.files),
            sha256=source.sha256,
        )
        for source in job.sources
    ]
    clock.start("filter")
    for result in pool.map("scan", _sized(read_batches(job.sources), sizes)):
        results.append(result)
        clock.advance(sizes[len(results) - 1])
        for source, reason, message in result.bad:
            records[source].bad[reason] = records[source].bad.get(reason, 0) + 1
            if len(records[source].bad_examples) < MAX_BAD_EXAMPLES:
                records[source].bad_examples.append(message)
    reasons = _concatenate([result.reasons for result in results], np.uint8)
    if job.recipe.data.deduplicate == "exact":
        kept = np.flatnonzero(reasons == KEPT)
        keys = np.concatenate([np.zeros((0, 16), np.uint8), *(result.keys for result in results)])[kept]
        reasons[kept[~first_occurrences(keys)]] = DUPLICATE
    corpus = _decide(job, results, reasons, records)
    clock.finish()
    return corpus


def _sized(batches: Iterator[Any], sizes: list[int]) -> Iterator[tuple[Any]]:
    for batch in batches:
        sizes.append(sum(len(raw.data) for raw in batch))
        yield (batch,)


def _concatenate(parts: list[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts]).astype(dtype)


def _decide(
    job: Job, results: list[ScanResult], reasons: npt.NDArray[np.uint8], records: list[SourceRecord]
) -> Corpus:
    sources = _concatenate([result.sources for result in results], np.int32)
    num_bytes = _concatenate([result.num_bytes for result in results], np.int64)
    hashes = _concatenate([result.split_hashes for result in results], np.uint64)
    kept = np.flatnonzero(reasons == KEPT)
    decisions = np.full(len(reasons), DROP, dtype=np.uint8)
    validation, fallback = held_out(hashes[kept], job.recipe.data.validation_fraction)
    decisions[kept] = validation
    for index, record in enumerate(records):
        mine = sources == index
        record.read.add(int(mine.sum()), int(num_bytes[mine].sum()))
        for code in np.unique(reasons[mine]):
            if code != KEPT:
                chosen = mine & (reasons == code)
                record.removed[REASONS[code]] = Count(
                    documents=int(chosen.sum()), bytes=int(num_bytes[chosen].sum())
                )
        for split, name in enumerate(SPLITS):
            chosen = mine & (decisions == split)
            record.kept[name] = Count(documents=int(chosen.sum()), bytes=int(num_bytes[chosen].sum()))
    if not len(kept):
        _raise_empty(records)
    if validation.all():
        _raise_unsplittable(job, len(np.unique(hashes[kept])), len(kept))
    starts = np.cumsum([0, *(len(result.reasons) for result in results)]).astype(np.int64)
    return Corpus(decisions, num_bytes, hashes, starts, records, fallback)


# What to do about reasons that are no filter of the recipe.
_FIXES = {
    "no_answer": "give conversations in which the assistant says something",
    "control_tokens": "remove the template's control tokens from the messages",
    "equal_answers": "look at chosen_field and rejected_field of data.sources: both hold the same answer",
    "prompts_differ": "look at chosen_field and rejected_field of data.sources: both answer one prompt",
}


def _raise_empty(records: list[SourceRecord]) -> None:
    details = []
    for record in records:
        lost = [f"{count.documents} by {reason}" for reason, count in sorted(record.removed.items())]
        lost += [f"{number} as {reason}" for reason, number in sorted(record.bad.items())]
        removed = f"removed {', '.join(lost)}" if lost else "nothing was found"
        details.append(f"{record.path}: {record.files} files, {record.read.documents} documents, {removed}")
    reasons = {reason for record in records for reason in record.removed}
    fixes = [_FIXES[reason] for reason in sorted(reasons & _FIXES.keys())]
    if not fixes or reasons - _FIXES.keys():
        fixes.append("loosen data.filters, or check that the sources hold text")
    raise DataError("the corpus is empty after filtering: " + "; ".join(details), fix="; ".join(fixes))


def _raise_unsplittable(job: Job, num_groups: int, num_documents: int) -> None:
    fraction = job.recipe.data.validation_fraction
    if fraction >= 1:
        raise DataError(
            f"data.validation_fraction is {fraction}: nothing would be left to train on",
            fix="use a smaller fraction, such as 0.02",
        )
    raise DataError(
        f"the corpus cannot be split: its {num_documents} documents are {num_groups} group (a file of a "
        "folder, a row, a module), and both training and validation need one",
        fix="add documents, name a single long file as the source itself (it is then cut into sections), or "
        "set data.validation_fraction to 0",
    )
