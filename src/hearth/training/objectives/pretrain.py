"""Pretraining: every next token of every document counts."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from hearth.training.batches import IGNORE, Batch
from hearth.training.loss import token_loss_sum
from hearth.training.objectives.base import Losses, Objective


class Pretrain(Objective):
    """Next-token prediction. Chat data trains on every turn here: its mask is lifted."""

    name = "pretrain"
    sections = frozenset()

    def prepare(self, batch: Batch) -> Batch:
        """Fill in labels that a chat mask has taken out: the next input of the same document."""
        labels = batch.labels_BT
        following = torch.full_like(labels, IGNORE)
        same = (batch.segment_ids_BT[:, 1:] == batch.segment_ids_BT[:, :-1]) & (
            batch.segment_ids_BT[:, 1:] >= 0
        )
        following[:, :-1] = torch.where(same, batch.input_ids_BT[:, 1:], IGNORE)
        labels = torch.where(labels == IGNORE, following, labels)
        return dataclasses.replace(batch, labels_BT=labels, num_valid=int((labels != IGNORE).sum()))

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """Sum of the next-token losses."""
        return Losses.of_tokens(*token_loss_sum(model, batch))
