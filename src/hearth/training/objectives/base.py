"""What every objective is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hearth.training.batches import Batch


class Objective:
    """A pure loss. Its sum is divided by the number of tokens of the whole optimizer step, by the loop."""

    name = ""

    def check(self, dataset: Any) -> None:
        """Raise ConfigError when the data cannot serve the objective; called before anything is built."""

    def prepare(self, batch: Batch) -> Batch:
        """Choose the labels of a batch. Default: as the data has them."""
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Sum of the token losses, and how many tokens it sums over."""
        raise NotImplementedError
