"""Does drafting pay? Decided by the tokens per second that were measured, with drafts and without.

Verifying costs little while a step waits for memory, and as much as it computes once it does not, which
depends on the batch; how many drafts are right depends on the text. Neither is known beforehand, so each
batch size is measured both ways, and again now and then.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

_MIN_SAMPLES = 4  # steps of a kind before it is judged
_WINDOW = 16  # steps of a kind that are remembered
_REFRESH = 64  # steps with drafts after which one without is measured again
_PROBE = 64  # steps without drafts after which drafts are tried again; twice as many after each failure
_LONGEST_PROBE = 8192
_MARGIN = 1.02  # gain from which drafts that were off come back: equal rates must not swing to and fro


@dataclass(frozen=True)
class Sample:
    """One decoding step: tokens that a sequence gained on average, and how long the step took."""

    tokens: float
    seconds: float


def rate(samples: deque[Sample]) -> float:
    """Tokens per second and sequence. The median forgives a step that the machine held up."""
    return statistics.fmean(s.tokens for s in samples) / statistics.median(s.seconds for s in samples)


@dataclass
class BatchRecord:
    """What is known of one batch size."""

    plain: deque[Sample] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    drafted: deque[Sample] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    is_on: bool = True
    since_other: int = 0  # steps since the last of the kind that is not the present one
    probe_after: int = _PROBE
    is_probing: bool = False

    @property
    def is_judged(self) -> bool:
        return len(self.plain) >= _MIN_SAMPLES and len(self.drafted) >= _MIN_SAMPLES


def pays(record: BatchRecord) -> bool:
    """Whether drafts gain tokens per second at this batch size, by its samples; both kinds are needed."""
    return rate(record.drafted) > rate(record.plain) * (1.0 if record.is_on else _MARGIN)


def decide(records: Mapping[int, BatchRecord], batch: int) -> bool:
    """Whether the next step of this batch size shall have drafts. Pure: the same records, the same answer.

    Where nothing was measured, a smaller batch that loses by drafts decides: per sequence a draft costs no
    less in a larger one.
    """
    record = records.get(batch, BatchRecord())
    if record.is_judged:
        if record.is_on:
            return record.since_other < _REFRESH
        return record.is_probing or record.since_other >= record.probe_after
    if len(record.drafted) < _MIN_SAMPLES:
        smaller = [size for size, other in records.items() if size < batch and other.is_judged]
        loses = bool(smaller) and not records[max(smaller)].is_on
        return not loses or record.is_probing or record.since_other >= record.probe_after
    return False


def batch_key(num_sequences: int) -> int:
    """Batch sizes that are judged together: each up to 8, then four to each doubling."""
    shift = max(0, num_sequences.bit_length() - 3)
    return num_sequences >> shift << shift


class Gate:
    """Keeps the records of an engine up to date."""

    def __init__(self) -> None:
        self.records: dict[int, BatchRecord] = {}

    def wants_drafts(self, num_sequences: int) -> bool:
        return decide(self.records, batch_key(num_sequences))

    def record(self, num_sequences: int, *, drafted: bool, tokens: int, seconds: float) -> None:
        """Take note of a step that did nothing but decode ``num_sequences`` sequences."""
        batch = batch_key(num_sequences)
        wanted = decide(self.records, batch)
        record = self.records.setdefault(batch, BatchRecord())
        sample = Sample(tokens / num_sequences, seconds)
        if drafted and not record.is_on and not record.is_probing:
            # A probe judges by what it sees itself: the text may have changed since the last one.
            record.is_probing = True
            record.drafted.clear()
        (record.drafted if drafted else record.plain).append(sample)
        record.since_other = 0 if drafted is not record.is_on else record.since_other + 1
        if not record.is_judged:
            # Not even tried because a smaller batch loses: off until a probe shows otherwise.
            if not wanted and len(record.drafted) < _MIN_SAMPLES:
                record.is_on = False
            return
        if record.is_on or record.is_probing:
            self._judge(record)

    def _judge(self, record: BatchRecord) -> None:
        was_on, record.is_on = record.is_on, pays(record)
        if record.is_on:
            record.probe_after = _PROBE
        elif record.is_probing:
            record.probe_after = min(2 * record.probe_after, _LONGEST_PROBE)
        if was_on is not record.is_on or record.is_probing:
            record.since_other = 0
        record.is_probing = False
