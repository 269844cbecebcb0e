"""How gradients become updates: optimizers by name, groups of weights, and state by the names of weights."""

from __future__ import annotations

from hearth.training.optimizers.build import build_optimizer, set_learning_rate
from hearth.training.optimizers.groups import trainable_parameters
from hearth.training.optimizers.size import state_bytes
from hearth.training.optimizers.state import load_optimizer_tensors, optimizer_tensors

__all__ = [
    "build_optimizer",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "set_learning_rate",
    "state_bytes",
    "trainable_parameters",
]
