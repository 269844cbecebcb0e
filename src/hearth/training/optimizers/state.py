"""The state of any optimizer by the names of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hearth.errors import ConfigError, IntegrityError
from hearth.parallel.shards import shape_of, taken
from hearth.training.optimizers.adamw8bit import AdamW8bit
from hearth.training.optimizers.groups import trainable_parameters
from hearth.training.optimizers.lion import Lion
from hearth.training.optimizers.muon import MuonWithAdamW

_ADAMW = {"step", "exp_avg", "exp_avg_sq"}
# What one weight may have: by its shape, or by what it is.
_FIELDS: dict[type[torch.optim.Optimizer], list[set[str]]] = {
    torch.optim.AdamW: [_ADAMW],
    torch.optim.Adafactor: [{"step", "row_var", "col_var"}, {"step", "variance"}],
    Lion: [{"exp_avg"}],
    MuonWithAdamW: [{"momentum_buffer"}, _ADAMW],
    AdamW8bit: [
        {"step", "exp_avg", "root"},
        {"step", "exp_avg", "root", "exp_avg_scale", "root_scale"},
    ],
}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """``WEIGHT|KEY`` → tensor: independent of the order of weights, so another layout can read it."""
    return {
        f"{name}|{key}": torch.as_tensor(value)
        for name, weight in trainable_parameters(model).items()
        for key, value in optimizer.state.get(weight, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """The reverse of ``optimizer_tensors``. A weight that never had a gradient has no state.

    Raises IntegrityError when the state belongs to other weights, ConfigError when it is the state of another
    optimizer.
    """
    states: dict[str, dict[str, str]] = {}  # weight, field → key
    for key in tensors:
        name, _, field = key.rpartition("|")
        states.setdefault(name, {})[field] = key
    weights = trainable_parameters(model)
    unknown = [name for name in states if name not in weights]
    if unknown:
        raise IntegrityError(
            f"the optimizer state of the checkpoint is of other weights: {unknown[0]} does not train here",
            fix="keep model.adapter and train.parameter_groups of the run",
        )
    for name, state in states.items():
        weight = weights[name]
        _require_same_kind(optimizer, name, set(state))
        # Fused AdamW counts on the device; the others read their count every step, so it stays on the host.
        fused = isinstance(optimizer, torch.optim.AdamW | MuonWithAdamW)
        optimizer.state[weight] = {
            field: tensors[key] if field == "step" and not fused else _placed(tensors, key, weight)
            for field, key in state.items()
        }


def _placed(tensors: Mapping[str, Tensor], key: str, weight: Tensor) -> Tensor:
    """A value on the device of its weight, spread as that is where it has the same shape."""
    alike = shape_of(tensors, key) == tuple(weight.shape)
    return taken(tensors, key, weight) if alike else tensors[key].to(weight.device)


def _require_same_kind(optimizer: torch.optim.Optimizer, name: str, fields: set[str]) -> None:
    if fields not in _FIELDS[type(optimizer)]:
        raise ConfigError(
            f"the checkpoint holds the state of another optimizer than {type(optimizer).__name__}: "
            f"{name} has {', '.join(sorted(fields))}",
            fix="resume with the train.optimizer of the run, or start a new run from its model",
        )
