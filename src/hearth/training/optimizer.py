"""AdamW, and its state by the names of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hearth.config.recipe import TrainSection
from hearth.errors import IntegrityError


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → weight for everything that trains, tied weights once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def build_optimizer(model: nn.Module, section: TrainSection) -> torch.optim.AdamW:
    """AdamW over the trainable weights; only matrices decay, not norms or biases."""
    weights = trainable_parameters(model).values()
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        fused=True,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """``WEIGHT|KEY`` → tensor: independent of the order of weights, so another layout can read it."""
    return {
        f"{name}|{key}": torch.as_tensor(value)
        for name, weight in trainable_parameters(model).items()
        for key, value in optimizer.state.get(weight, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """The reverse of ``optimizer_tensors``."""
    states: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("|")
        states.setdefault(name, {})[field] = value
    weights = trainable_parameters(model)
    if states and set(states) != set(weights):
        raise IntegrityError("the optimizer state of the checkpoint belongs to other weights")
    for name, state in states.items():
        weight = weights[name]
        optimizer.state[weight] = {
            field: value.to(weight.device) if field != "step" else value.to(weight.device, torch.float32)
            for field, value in state.items()
        }
