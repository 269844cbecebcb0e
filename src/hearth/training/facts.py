"""What is known of a model as a whole, before it is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hearth.models import flops_per_token, num_parameters
from hearth.training.identity import shapes_hash
from hearth.training.optimizers import trainable_parameters


@dataclass(frozen=True)
class ModelFacts:
    """Of all stages and parts. ``shapes``: a hash of the names and shapes of its weights."""

    num_parameters: int
    num_trainable_parameters: int
    flops_per_token: float
    shapes: str
    names: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, sequence_length: int) -> ModelFacts:
        """The facts of a model that is still whole."""
        whole: Any = model
        return cls(
            num_parameters(model),
            sum(weight.numel() for weight in trainable_parameters(model).values()),
            flops_per_token(whole, sequence_length),
            shapes_hash(model),
            frozenset(model.state_dict()),
        )
