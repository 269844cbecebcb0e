"""A reward model: a scalar for an answer, so that better answers score higher (Bradley and Terry 1952).

The loss is that of Ouyang et al. 2022, eq. 1. Rewards are only defined up to a constant; ``center_weight``
pulls the mean of each pair towards zero (Eisenstein et al. 2023, section 2).

The score is read where ``AutoModelForSequenceClassification`` reads it: at the last token that is not the
padding token.

Shape suffixes: B rows, T positions, S sequences, P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hearth.errors import ConfigError, DataError
from hearth.models.reward_head import has_reward_head, with_reward_head
from hearth.training.batches import Batch, Rows, describe_row
from hearth.training.loss import unwrap
from hearth.training.objectives.base import Losses
from hearth.training.objectives.preference import PAIRS, PreferenceObjective, pair_metrics
from hearth.training.samples import Sample, collate_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hearth.training.trainer import Trainer


def bradley_terry_losses(rewards_P2: Tensor, center_weight: float = 0.0) -> Tensor:
    """Negative log-likelihood of the comparisons; centring adds the squared sum of a pair's rewards."""
    losses_P = -F.logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1])
    if center_weight:
        losses_P = losses_P + center_weight * rewards_P2.sum(1).square()
    return losses_P


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """The reward of each sequence, scores_S: one label of each sequence is marked, at its last token."""
    inner: Any = unwrap(model)
    hidden_BTD = inner.base_model(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
    ).last_hidden_state
    ends = batch.labels_BT >= 0
    segments = batch.segment_ids_BT[ends]
    # In the head's own type: in bfloat16 two answers that score about 8 would differ by 1/16 or not at all.
    with torch.autocast(hidden_BTD.device.type, enabled=False):
        values: Tensor = inner.score(hidden_BTD[ends].to(next(inner.score.parameters()).dtype))[:, 0]
    exact = values if values.dtype == torch.float64 else values.float()
    return exact.new_zeros(len(segments)).index_add(0, segments, exact)


class RewardModel(PreferenceObjective):
    """Trains ``AutoModelForSequenceClassification`` with one label on pairs."""

    name = "reward"
    reads = frozenset({"center_weight"})

    def check(self, dataset: Any) -> None:
        """Refuse a token loss besides: a reward model has no output layer."""
        super().check(dataset)
        self.refuse("scores with a head that no stage has", "pipeline")
        if self.settings.sft_weight:
            raise ConfigError(
                f"train.preference.sft_weight is {self.settings.sft_weight}, but this model has no tokens",
                fix="leave it out",
            )

    def adapt_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with a scalar head instead of its output layer."""
        return with_reward_head(model, seed=self.config.train.seed)

    def start(self, trainer: Trainer, run_dir: Path | None) -> None:
        """Refuse a model without a scalar head."""
        super().start(trainer, run_dir)
        model = unwrap(trainer.model)
        if not has_reward_head(model):
            raise ConfigError(
                f"a reward model needs one linear score head, {type(model).__name__} has none",
                fix="give AutoModelForSequenceClassification with num_labels=1",
            )
        self._pad_id = model.config.get_text_config().pad_token_id

    @property
    def max_length(self) -> int:
        """The last token is read, too, so it has to have a position."""
        return self.config.data.sequence_length - 1

    _pad_id: int | None = None

    def check_sample(self, sample: Sample, rows: Rows, index: int) -> None:
        """A score needs no mask, only a text."""
        read = [(tokens, np.ones(len(tokens), np.bool_)) for tokens, _ in sample.parts]
        super().check_sample(dataclasses.replace(sample, parts=tuple(read)), rows, index)

    def _bare(self, rows: Rows, indices: Sequence[int]) -> Batch:
        """Sequences with one marked position each: the last token, behind which a column is added for it."""
        samples = []
        for index in indices:
            sample: Sample = rows[index]
            self.check_sample(sample, rows, index)
            parts = []
            for tokens, _ in sample.parts:
                real = (
                    np.flatnonzero(tokens != self._pad_id) if self._pad_id is not None else [len(tokens) - 1]
                )
                if not len(real):
                    raise DataError(
                        f"{describe_row(rows, index)} holds padding tokens alone", fix="leave it out"
                    )
                marked = np.zeros(len(tokens) + 1, np.bool_)
                marked[real[-1] + 1] = True
                parts.append((np.append(tokens, 0), marked))
            samples.append(dataclasses.replace(sample, parts=tuple(parts)))
        return collate_samples(samples, indices)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Pairs."""
        assert batch.sequences is not None
        return {PAIRS: len(batch.sequences) / 2}

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Sum of the losses of pairs."""
        rewards_P2 = scores(model, batch).view(-1, 2)
        losses_P = bradley_terry_losses(rewards_P2, self.settings.center_weight)
        return Losses({PAIRS: losses_P.sum()}, {PAIRS: float(len(losses_P))}, pair_metrics(rewards_P2))
