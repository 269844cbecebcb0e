"""The parts of a checkpoint that every run has, besides its counters and random states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hearth.errors import IntegrityError
from hearth.parallel.shards import shape_of, taken
from hearth.training.optimizers import load_optimizer_tensors, optimizer_tensors


class Weights:
    """What training changes of a model; ``weights`` returns the tensors themselves, by name."""

    def __init__(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        self._weights = weights

    def state_tensors(self) -> dict[str, Tensor]:
        """The weights as they are."""
        return {name: weight.detach() for name, weight in self._weights().items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], /) -> None:
        """Copy into the weights. Raises IntegrityError for names or shapes of another model."""
        weights = self._weights()
        own = {name: tuple(weight.shape) for name, weight in weights.items()}
        saved = {name: shape_of(tensors, name) for name in tensors}
        if own != saved:
            name = min(name for name, _ in own.items() ^ saved.items())
            raise IntegrityError(f"the checkpoint holds the weights of another model: {name} differs")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(taken(tensors, name, weight))


class OptimizerState:
    """What an optimizer remembers, by the names of the weights."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model

    def state_tensors(self) -> dict[str, Tensor]:
        """``WEIGHT|KEY`` → tensor."""
        return optimizer_tensors(self._optimizer, self._model)

    def load_state_tensors(self, tensors: Mapping[str, Tensor], /) -> None:
        """Take over the moments. Raises IntegrityError or ConfigError for those of something else."""
        load_optimizer_tensors(self._optimizer, self._model, tensors)


class Counters:
    """Base of a dataclass of JSON values that is a part of a checkpoint."""

    def state_values(self) -> dict[str, Any]:
        """All fields."""
        return dict(vars(self))

    def load_state_values(self, values: Mapping[str, Any], /) -> None:
        """All fields; one that the checkpoint does not know keeps its default."""
        vars(self).update(values)
