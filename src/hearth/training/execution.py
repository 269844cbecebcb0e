"""How a model is executed: float8 layers, activation checkpointing, compiled blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from hearth.training.activation import checkpoint_activations
from hearth.training.compiling import compile_blocks
from hearth.training.float8 import use_float8
from hearth.training.loss import split_head

if TYPE_CHECKING:
    from hearth.config.recipe import TrainSection


def set_up_execution(
    model: nn.Module, section: TrainSection, *, precision: str, device: torch.device
) -> str | None:
    """Let the model run as ``precision``, ``activation_checkpointing`` and ``compile`` say; weights stay.

    Returns what must be told to the user: that nothing is compiled here, and why. Raises ConfigError for a
    model or a combination that cannot.
    """
    split_head(model)  # tries the model, as it was made, and remembers
    if precision == "fp8":
        use_float8(model)
    checkpoint_activations(model, section.activation_checkpointing)
    if not section.compile:
        return None
    reason = compile_blocks(model, device, checkpointing=section.activation_checkpointing)
    return None if reason is None else f"train.compile is not used, as torch cannot compile here: {reason}"
