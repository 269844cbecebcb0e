"""What all preference objectives share: pairs of answers, their log-probabilities, metrics, checks.

An objective itself is a pure function from log-probabilities to losses; see the files beside this one.

Shape suffixes: S sequences, P pairs, 2 the sides of a pair (0 chosen, 1 rejected).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from hearth.config.objectives import PreferenceSection
from hearth.errors import ConfigError, DataError
from hearth.training.batches import IGNORE, Batch, Rows, describe_row, row_at
from hearth.training.logprobs import sequence_logprobs
from hearth.training.objectives.base import TOKENS, Losses, Objective
from hearth.training.reference import Reference, Table, make_reference
from hearth.training.samples import Sample, collate_samples, sample_rows

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer

PAIRS = "pairs"
_PAIRS_LOOKED_AT = 64
_ROWS_BEFORE_AUTO = 8  # without gradients they take little memory


@dataclass(frozen=True)
class Pairs:
    """What a loss over pairs may depend on: summed log-probabilities, numbers of tokens, the reference."""

    logp_P2: Tensor
    num_tokens_P2: Tensor
    reference_P2: Tensor | None = None

    @property
    def mean_logp_P2(self) -> Tensor:
        """Log-probability per token."""
        return self.logp_P2 / self.num_tokens_P2

    @property
    def log_ratio_P2(self) -> Tensor:
        """How much likelier an answer is than under the reference, in nats."""
        assert self.reference_P2 is not None
        return self.logp_P2 - self.reference_P2


class PreferenceObjective(Objective):
    """Samples with one or two answers; how they are checked, batched, and compared with a reference."""

    sections = frozenset({"preference"})
    kind = "preference"
    num_parts: ClassVar[int] = 2
    has_reference: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()  # the keys of train.preference that it looks at

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.settings: PreferenceSection = config.train.preference
        self._reference: Reference | None = None

    # ── before training ──────────────────────────────────────────────────────────────────────────────────

    def check(self, dataset: Any) -> None:  # noqa: ARG002
        """Refuse settings that would have no effect, and a reference that cannot be."""
        self.refuse("needs whole sequences", "context")
        reads = self.reads | {"sft_weight"} | ({"reference"} if self.has_reference else set())
        for key, field in PreferenceSection.model_fields.items():
            value = getattr(self.settings, key)
            if key not in reads and value != field.default:
                raise ConfigError(
                    f"train.preference.{key} is {value}, but the objective {self.name} does not read it",
                    fix=f"leave it out; {self.name} reads {', '.join(sorted(reads))}",
                )
        if self.settings.reference == "adapter" and self.config.model.adapter is None:
            raise ConfigError(
                "train.preference.reference is adapter, but the recipe has no model.adapter",
                fix="add model.adapter, or use reference: precompute or model",
            )
        stages = self.config.parallel.pipeline
        if self.has_reference and stages > 1 and self.settings.reference == "model":
            raise ConfigError(
                f"train.preference.reference is model, but parallel.pipeline is {stages}: no process could "
                "compare a whole copy",
                fix="use reference: precompute",
            )

    def rows(self, dataset: Any, split: str) -> Rows | None:
        """The samples of a split. Raises DataError where the answers of the first pairs are all the same."""
        found = self.samples_of_kind(dataset, split, self.kind)
        if found is not None and len(found) and self.num_parts == 2:
            first = min(len(found), _PAIRS_LOOKED_AT)
            if all(is_tie(found[index]) for index in range(first)):
                raise DataError(
                    f"the chosen and the rejected answer are the same in all of the first {first} pairs",
                    fix="look at chosen_field and rejected_field of data.sources",
                )
        return found

    def samples_of_kind(self, dataset: Any, split: str, kind: str) -> Rows | None:
        """The samples of a split that holds this kind."""
        truncate = self.config.data.truncate
        return sample_rows(dataset, split, kind=kind, max_length=self.max_length, truncate=truncate)

    @property
    def max_length(self) -> int:
        """Positions of the longest sequence; it has one token more, which is only predicted."""
        return self.config.data.sequence_length

    def start(self, trainer: Trainer, run_dir: Path | None) -> None:
        """Freeze the reference: the weights as they are now."""
        if self.has_reference:
            self._reference = make_reference(trainer, self.tables(trainer), run_dir)

    def tables(self, trainer: Trainer) -> list[Table]:
        """Whose reference log-probabilities a run needs: its samples, in the order that it meets them."""

        def table(name: str, rows: Rows, slots: Any) -> Table:
            return Table(name, len(rows), self.num_parts, slots, lambda group: self._bare(rows, group), rows)

        found = [table("train", trainer.rows, lambda: training_groups(trainer))]
        if trainer.eval_rows is not None:
            found.append(table("validation", trainer.eval_rows, lambda: evaluation_groups(trainer)))
        return found

    # ── batches ──────────────────────────────────────────────────────────────────────────────────────────

    def collate(self, rows: Rows, indices: Sequence[int]) -> Batch:
        """The sequences of these samples, with their reference log-probabilities where they are known."""
        batch = self._bare(rows, indices)
        return batch if self._reference is None else self._reference.attach(batch, rows, indices)

    def _bare(self, rows: Rows, indices: Sequence[int]) -> Batch:
        samples = [rows[index] for index in indices]
        for index, sample in zip(indices, samples, strict=True):
            self.check_sample(sample, rows, index)
        return collate_samples(samples, indices)

    def check_sample(self, sample: Sample, rows: Rows, index: int) -> None:
        """Raise DataError for a sample that no loss can be computed from."""
        where, longest = describe_row(rows, index), self.max_length
        if len(sample.parts) != self.num_parts:
            raise DataError(
                f"{where} has {len(sample.parts)} sequences, {self.name} needs {self.num_parts}",
                fix="chosen and rejected, in this order" if self.num_parts == 2 else "prompt and one answer",
            )
        for (tokens, mask), side in zip(sample.parts, ("chosen", "rejected"), strict=False):
            what = f"the {side} answer of {where}" if self.num_parts == 2 else f"the answer of {where}"
            if len(tokens) > longest + 1:
                raise DataError(
                    f"{what} has {len(tokens)} tokens with its prompt; {longest + 1} fit",
                    fix="raise data.sequence_length, or leave the sample out",
                )
            if not np.asarray(mask)[1:].any():
                raise DataError(
                    f"{what} has no token that counts: its loss mask is empty",
                    fix="look at the masks with `hearth data inspect --masks`",
                )

    # ── the loss ─────────────────────────────────────────────────────────────────────────────────────────

    @property
    def token_weight(self) -> float:
        """Weight of the token loss of good answers."""
        return self.settings.sft_weight

    def num_chosen_tokens(self, batch: Batch) -> int:
        """Labels of good answers."""
        good_S = good_sequences(batch)
        return int(good_S[batch.segment_ids_BT[batch.labels_BT != IGNORE]].sum())

    def reference_sums(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """Reference log-probabilities of the sequences, or None where the objective needs none."""
        return None if self._reference is None else self._reference.sums(model, batch)

    def with_token_loss(
        self, unit: str, losses: Tensor, logp_S: Tensor, batch: Batch, metrics: Mapping[str, Any]
    ) -> Losses:
        """The losses of pairs or answers, and the token loss of the good ones beside them."""
        chosen = -(logp_S * good_sequences(batch)).sum()
        num_chosen = self.num_chosen_tokens(batch)
        sums, counts = {unit: losses.sum()}, {unit: float(len(losses))}
        if self.token_weight:
            sums[TOKENS], counts[TOKENS] = self.token_weight * chosen, float(num_chosen)
        return Losses(sums, counts, {**metrics, "chosen_token_loss": (chosen.detach(), num_chosen)})


class PairObjective(PreferenceObjective):
    """Learns from pairs of a better and a worse answer. A subclass gives the losses and rewards of pairs."""

    def pair_losses(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """losses_P, and rewards_P2: the implicit rewards whose difference is the margin of a pair."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, float]:
        """Pairs, and the tokens of the chosen answers where they have a loss of their own."""
        assert batch.sequences is not None
        found = {PAIRS: len(batch.sequences) / 2}
        return {**found, TOKENS: self.num_chosen_tokens(batch)} if self.token_weight else found

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Sum of the losses of pairs, and of the chosen tokens where ``sft_weight`` asks for it."""
        logp_S, num_tokens_S = sequence_logprobs(model, batch)
        reference_S = self.reference_sums(model, batch)
        logp_P2 = logp_S.view(-1, 2)
        losses_P, rewards_P2 = self.pair_losses(
            Pairs(
                logp_P2,
                num_tokens_S.view(-1, 2),
                None if reference_S is None else reference_S.to(logp_S.dtype).view(-1, 2),
            )
        )
        metrics = {
            **pair_metrics(rewards_P2),
            "chosen_logprob": (logp_P2[:, 0].detach().sum(), len(logp_P2)),
            "rejected_logprob": (logp_P2[:, 1].detach().sum(), len(logp_P2)),
        }
        return self.with_token_loss(PAIRS, losses_P, logp_S, batch, metrics)


def pair_metrics(rewards_P2: Tensor) -> dict[str, tuple[Tensor | float, float]]:
    """Share of pairs in the right order, their margin, and the rewards of both sides."""
    rewards = rewards_P2.detach().double()
    margins = rewards[:, 0] - rewards[:, 1]
    num = len(rewards)
    return {
        "accuracy": ((margins > 0).sum(), num),
        "margin": (margins.sum(), num),
        "chosen_reward": (rewards[:, 0].sum(), num),
        "rejected_reward": (rewards[:, 1].sum(), num),
    }


def is_tie(sample: Sample) -> bool:
    """Whether both sequences of a pair are the same: such a pair changes no weight."""
    return len(sample.parts) == 2 and np.array_equal(sample.parts[0][0], sample.parts[1][0])


def good_sequences(batch: Batch) -> Tensor:
    """Which sequences are good answers: the chosen side of a pair, or an answer with a good verdict."""
    assert batch.sequences is not None
    return (batch.sequences.sides_S == 0) & (batch.sequences.labels_S > 0.5)


def reference_batch_size(trainer: Trainer) -> int:
    """Rows in a pass of the reference: those of a micro-batch, unless its size is found by training steps."""
    section = trainer.config.train
    size = section.micro_batch_size
    return min(_ROWS_BEFORE_AUTO, section.batch_size) if size == "auto" else size


def training_groups(trainer: Trainer) -> Iterator[list[int]]:
    """The rows of every micro-batch of the run, step by step."""
    size = reference_batch_size(trainer)
    for step in range(trainer.total_steps):
        rows = trainer.step_rows(step)
        yield from (rows[first : first + size] for first in range(0, len(rows), size))


def evaluation_rows(trainer: Trainer) -> list[int]:
    """The rows of an evaluation, in order."""
    assert trainer.eval_rows is not None
    return [
        row_at(index, seed=0, num_rows=len(trainer.eval_rows)) for index in range(trainer._num_eval_rows())
    ]


def evaluation_groups(trainer: Trainer) -> Iterator[list[int]]:
    """The rows of every micro-batch of an evaluation."""
    rows, size = evaluation_rows(trainer), reference_batch_size(trainer)
    yield from (rows[first : first + size] for first in range(0, len(rows), size))
