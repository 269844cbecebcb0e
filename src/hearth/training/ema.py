"""An exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hearth.errors import IntegrityError
from hearth.parallel.shards import taken
from hearth.training.optimizers import trainable_parameters


class WeightAverage:
    """Average of the weights that train, in float32, by name.

    After update n (counted from 1) the average is d · average + (1 - d) · weight with
    d = min(decay, n / (n + 9)): at the start it follows closely, so that the initial weights do not linger.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        assert 0.0 < decay < 1.0, decay
        self.decay = decay
        self.num_updates = 0
        self._model = model
        self._averages = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in trainable_parameters(model).items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step; not called for a step that was skipped."""
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (self.num_updates + 9))
        for name, weight in trainable_parameters(self._model).items():
            average = self._averages[name]
            average.lerp_(weight.to(average.dtype), 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the averaged weights; afterwards its own again, bit for bit."""
        weights = trainable_parameters(self._model)
        own = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            self._copy(self._averages, weights)
            yield
        finally:
            self._copy(own, weights)

    def copy_to_model(self) -> None:
        """Give the model the averaged weights for good: training is over."""
        self._copy(self._averages, trainable_parameters(self._model))

    @staticmethod
    @torch.no_grad()
    def _copy(values: dict[str, Tensor], weights: dict[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            weight.copy_(values[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: averages by the names of their weights, and the number of updates."""
        return {**self._averages, "|num_updates": torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of ``state_tensors``. Raises IntegrityError when they belong to other weights."""
        names = set(tensors) - {"|num_updates"}
        if names != set(self._averages):
            raise IntegrityError("the average of the weights in the checkpoint is of other weights")
        self.num_updates = int(tensors["|num_updates"])
        for name, average in self._averages.items():
            average.copy_(taken(tensors, name, average))
