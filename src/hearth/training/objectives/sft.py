"""Supervised fine-tuning: only the assistant's tokens count."""

from __future__ import annotations

from typing import Any

from torch import nn

from hearth.errors import ConfigError
from hearth.training.batches import Batch
from hearth.training.loss import token_loss_sum
from hearth.training.objectives.base import Losses, Objective


class SupervisedFineTuning(Objective):
    """Next-token prediction where the data's loss mask allows it."""

    name = "sft"
    sections = frozenset()

    def check(self, dataset: Any) -> None:
        """Refuse a dataset of plain documents: without a mask this would silently be pretraining."""
        split = dataset.split("train") if callable(getattr(dataset, "split", None)) else dataset
        if not hasattr(split, "loss_mask") or not getattr(split, "num_documents", 0):
            return
        if split.loss_mask(0) is None:
            raise ConfigError(
                "train.objective is sft, but the dataset holds plain text without a loss mask",
                fix="give chat data (data.sources[].format: chat), or use objective: pretrain",
            )

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Sum of the losses of the assistant's tokens."""
        return Losses.of_tokens(*token_loss_sum(model, batch))
