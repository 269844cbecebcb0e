"""How large the state of an optimizer will be."""

from __future__ import annotations

import torch
from torch import Tensor

from hearth.training.clipping import local
from hearth.training.optimizers.adamw8bit import AdamW8bit, empty_state
from hearth.training.optimizers.lion import Lion
from hearth.training.optimizers.muon import MuonWithAdamW


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this process's state once every weight has had a gradient, before the first step is made."""
    return sum(
        _weight_state_bytes(optimizer, local(weight), hidden=bool(group.get("hidden")))
        for group in optimizer.param_groups
        for weight in group["params"]
    )


def _weight_state_bytes(optimizer: torch.optim.Optimizer, weight: Tensor, *, hidden: bool) -> int:
    size, step = weight.element_size(), 4
    if isinstance(optimizer, AdamW8bit):
        state = empty_state(torch.empty(weight.shape, dtype=weight.dtype, device="meta"))
        return sum(value.numel() * value.element_size() for value in state.values())
    if isinstance(optimizer, Lion) or (isinstance(optimizer, MuonWithAdamW) and hidden):
        return size * weight.numel()
    if isinstance(optimizer, torch.optim.Adafactor):
        if weight.ndim < 2:
            return step + size * weight.numel()
        return step + size * (weight.numel() // weight.shape[-1] + weight.numel() // weight.shape[-2])
    return step + 2 * size * weight.numel()
