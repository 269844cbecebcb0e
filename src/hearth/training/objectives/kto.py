"""Kahneman-Tversky optimisation: learns from single answers with a verdict (Ethayarajh et al. 2024, eq. 8).

Gains and losses are felt against a baseline z0: how far the policy has moved from the reference on answers
that do not belong to their prompts. It is estimated over the whole optimizer step, each prompt with the
answer of the sample before it, without gradient and before the first micro-batch, so that it does not depend
on how the step is cut; TRL estimates it for each micro-batch anew.

Shape suffix: S sequences, one an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hearth.errors import ConfigError
from hearth.training.batches import Batch, Rows
from hearth.training.logprobs import sequence_logprobs
from hearth.training.objectives.base import TOKENS, Losses
from hearth.training.objectives.preference import (
    PreferenceObjective,
    evaluation_rows,
    good_sequences,
    reference_batch_size,
)
from hearth.training.reference import Table, evaluating
from hearth.training.samples import Sample, collate_samples
from hearth.training.shares import own_turns

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer

ANSWERS = "answers"
_BASELINE = "baseline"  # Batch.extras: z0 of the step, a scalar
_TRAIN, _VALIDATION = "train_mismatched", "validation_mismatched"


def kto_losses(rewards_S: Tensor, baseline: Tensor, good_S: Tensor, weights: tuple[float, float]) -> Tensor:
    """weight · (1 - value); rewards and baseline are scaled by beta; ``weights``: of good, of bad answers."""
    signs_S = torch.where(good_S, 1.0, -1.0).to(rewards_S.dtype)
    weights_S = torch.where(good_S, weights[0], weights[1]).to(rewards_S.dtype)
    return weights_S * torch.sigmoid(-signs_S * (rewards_S - baseline))


def mismatched(prompt: Sample, answer: Sample, longest: int) -> Sample:
    """The prompt of one sample with the answer of another, cut at the end where it is too long."""
    (prompt_tokens, prompt_mask), (answer_tokens, answer_mask) = prompt.parts[0], answer.parts[0]
    prompt_end, answer_start = int(np.argmax(prompt_mask)), int(np.argmax(answer_mask))
    tokens = np.concatenate([prompt_tokens[:prompt_end], answer_tokens[answer_start:]])[: longest + 1]
    mask = np.concatenate([np.zeros(prompt_end, np.bool_), answer_mask[answer_start:]])[: longest + 1]
    return Sample(((tokens, mask),))


class Unpaired:
    """Pairs as twice as many single answers: the chosen ones are good, the rejected ones bad."""

    def __init__(self, pairs: Rows) -> None:
        self._pairs = pairs
        self.split = getattr(pairs, "split", None)
        self.fitting = getattr(pairs, "fitting", None)

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        number, side = divmod(index, 2)
        return Sample((self._pairs[number].parts[side],), label=1.0 - side)


class KTO(PreferenceObjective):
    """Makes good answers likelier and bad ones less likely than the reference does."""

    name = "kto"
    kind = "feedback"
    num_parts = 1
    has_reference = True
    reads = frozenset({"beta", "desirable_weight", "undesirable_weight"})

    def check(self, dataset: Any) -> None:
        """Refuse a step of one answer besides: there is no other answer to take the baseline from."""
        super().check(dataset)
        if self.config.train.batch_size < 2:
            raise ConfigError(
                "train.batch_size is 1, but kto compares each prompt with the answers of others in its step",
                fix="use a batch_size of 2 or more",
            )

    def rows(self, dataset: Any, split: str) -> Rows | None:
        """Answers with a verdict; each pair of a dataset of comparisons is two of them."""
        part = dataset.split(split) if callable(getattr(dataset, "split", None)) else dataset
        paired = getattr(part, "kind", None) == "preference"
        found = self.samples_of_kind(part, split, "preference" if paired else self.kind)
        if found is not None and len(found) and len(found[0].parts) == 2:
            return Unpaired(found)
        return found

    # ── the baseline ─────────────────────────────────────────────────────────────────────────────────────

    def tables(self, trainer: Trainer) -> list[Table]:
        """Besides the samples the mismatched sequences, by their position in the run and in an evaluation."""
        rows_of_step, batch_size = trainer.step_rows, trainer.config.train.batch_size

        def training(group: Sequence[int]) -> Batch:
            step = group[0] // batch_size
            return self._mismatched(trainer.rows, rows_of_step(step), [p % batch_size for p in group])

        num = trainer.total_steps * batch_size
        groups = lambda: _groups(trainer, num, batch_size)  # noqa: E731 - a closure over the run's size
        found = [*super().tables(trainer), Table(_TRAIN, num, 1, groups, training)]
        if trainer.eval_rows is not None:
            rows, held_out = trainer.eval_rows, evaluation_rows(trainer)
            found.append(
                Table(
                    _VALIDATION,
                    len(held_out),
                    1,
                    lambda: _groups(trainer, len(held_out), len(held_out)),
                    lambda group: self._mismatched(rows, held_out, group),
                )
            )
        return found

    def _mismatched(self, rows: Rows, indices: Sequence[int], positions: Sequence[int]) -> Batch:
        """At positions among ``indices``: that row's prompt and the answer of the row before, in a circle."""
        samples = []
        for position in positions:
            pair = (indices[position], indices[position - 1])
            for index in pair:
                self.check_sample(rows[index], rows, index)
            samples.append(mismatched(rows[pair[0]], rows[pair[1]], self.max_length))
        return collate_samples(samples, positions)

    def _baseline(
        self, trainer: Trainer, table: str, rows: Rows, indices: Sequence[int], first: int
    ) -> Tensor:
        """z0 of these rows, in nats and never negative; ``first``: the position of the first in the table.

        ``indices`` are the rows of all processes: each estimates over some of the mismatched pairs.
        """
        assert self._reference is not None
        reference = self._reference

        def log_ratios(model: nn.Module, batch: Batch) -> Tensor:
            policy_S, _ = sequence_logprobs(model, batch)
            return policy_S.double() - reference.sums(model, batch).double()

        total = torch.zeros((), dtype=torch.float64, device=trainer.device)
        size, num = trainer.micro_batch_size, len(indices)
        groups = [range(start, min(start + size, num)) for start in range(0, num, size)]

        def turns() -> Iterator[tuple[bool, Batch]]:
            for positions, counts in own_turns(trainer.world, groups):
                batch = self._mismatched(rows, indices, positions)
                yield counts, reference.attach(batch, table, [first + each for each in positions])

        with evaluating(trainer.model):
            for counts, ratios_S in trainer.passes.run_on_each(log_ratios, turns()):
                if counts:
                    total += ratios_S.sum()
        return (trainer.world.sum_over_batch(total) / num).clamp(min=0).cpu()

    def batches(self, trainer: Trainer, step: int, indices: Sequence[int]) -> list[Batch]:
        """Micro-batches that know the baseline of their step."""
        baseline = self._baseline(trainer, _TRAIN, trainer.rows, indices, step * len(indices))
        return [_with_baseline(batch, baseline) for batch in super().batches(trainer, step, indices)]

    def evaluation_batches(self, trainer: Trainer, rows: Rows, indices: Sequence[int]) -> Iterable[Batch]:
        """Micro-batches that know the baseline of all held-out rows."""
        baseline = self._baseline(trainer, _VALIDATION, rows, indices, 0)
        for batch in super().evaluation_batches(trainer, rows, indices):
            yield _with_baseline(batch, baseline)

    # ── the loss ─────────────────────────────────────────────────────────────────────────────────────────

    def counts(self, batch: Batch) -> dict[str, float]:
        """Answers, and the tokens of the good ones where they have a loss of their own."""
        assert batch.sequences is not None
        found = {ANSWERS: float(len(batch.sequences))}
        return {**found, TOKENS: self.num_chosen_tokens(batch)} if self.token_weight else found

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Sum of the losses of answers, and of the good ones' tokens where ``sft_weight`` asks for it."""
        logp_S, _ = sequence_logprobs(model, batch)
        reference_S = self.reference_sums(model, batch)
        assert reference_S is not None
        settings, good_S = self.settings, good_sequences(batch)
        rewards_S = settings.beta * (logp_S - reference_S.to(logp_S.dtype))
        baseline = settings.beta * batch.extras[_BASELINE].to(logp_S.dtype)
        weights = (settings.desirable_weight, settings.undesirable_weight)
        losses_S = kto_losses(rewards_S, baseline, good_S, weights)
        metrics = _metrics(rewards_S.detach().double(), baseline.double(), good_S)
        return self.with_token_loss(ANSWERS, losses_S, logp_S, batch, metrics)


def _metrics(rewards_S: Tensor, baseline: Tensor, good_S: Tensor) -> dict[str, tuple[Tensor | float, float]]:
    """Accuracy: the share of answers on the right side of the baseline."""
    num, num_good = len(rewards_S), int(good_S.sum())
    return {
        "accuracy": (((rewards_S > baseline) == good_S).sum(), num),
        "chosen_reward": (rewards_S[good_S].sum(), num_good),
        "rejected_reward": (rewards_S[~good_S].sum(), num - num_good),
        "baseline": (baseline * num, num),
    }


def _with_baseline(batch: Batch, baseline: Tensor) -> Batch:
    return dataclasses.replace(batch, extras={**batch.extras, _BASELINE: baseline})


def _groups(trainer: Trainer, num: int, per_step: int) -> Iterator[range]:
    """Positions 0 to ``num``, in micro-batches that do not reach over a step."""
    size = reference_batch_size(trainer)
    for first in range(0, num, max(1, per_step)):
        for start in range(first, first + per_step, size):
            yield range(start, min(start + size, first + per_step))
