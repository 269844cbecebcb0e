"""torch.compile for the blocks of a model, one by one."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hearth.errors import ConfigError
from hearth.training.loss import unwrap


def compile_blocks(model: nn.Module, device: torch.device, *, checkpointing: str = "none") -> str | None:
    """Compile every decoder layer in place; None, or the reason why this machine cannot.

    Layers of one class share their code, so it is compiled once, not once a layer, and not for the whole
    model: minutes less, and what is around the layers (packed masks, the loss) stays as it is.

    Raises ConfigError for selective checkpointing, whose operators do not exist in compiled code, and for a
    model without layers.
    """
    if checkpointing == "selective":
        raise ConfigError(
            "train.compile with train.activation_checkpointing: selective would keep nothing: compiled code "
            "has no single operators",
            fix="use activation_checkpointing: none (compiled layers recompute what is cheap by themselves) "
            "or full",
        )
    layers = [layer for layer in unwrap(model).modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"train.compile: {type(unwrap(model)).__name__} has no decoder layers that can be compiled",
            fix="use compile: false",
        )
    reason = why_no_compiler(device.type)
    if reason is None:
        # Of our table of 4-bit values, which is the same at every call.
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        for layer in layers:
            layer.compile()
    return reason


@functools.cache
def why_no_compiler(device: str) -> str | None:
    """Compile something tiny: None when that works, else the first line of what went wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler warns of itself
            compiled = torch.compile(lambda x: (x * 2 + 1).sum(), fullgraph=True)
            result = compiled(torch.ones(8, device=device))
        assert float(result) == 24.0
    except Exception as error:  # noqa: BLE001 (compilers fail in their own many ways; training goes on)
        cause = getattr(error, "inner_exception", error)  # torch wraps what its backend raises
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return f"{type(cause).__name__}: {lines[0] if lines else ''}"
    return None
