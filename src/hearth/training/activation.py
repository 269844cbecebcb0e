"""Activation checkpointing: what the backward pass needs is computed again instead of kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from hearth.errors import ConfigError
from hearth.training.loss import unwrap

# Operators whose results selective checkpointing keeps: products and attention, by the name without overload.
_KEPT = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_mm",
        "aten::_grouped_mm",
        "aten::_scaled_grouped_mm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_attention_math",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "torch_attn::_varlen_attn",
    }
)


def checkpoint_activations(model: nn.Module, mode: str) -> int:
    """Checkpoint every layer of a transformers model; the number of layers.

    full: keeps the input of a layer and runs the layer again in the backward pass. selective: keeps the
    results of products and of attention too, and runs only what is cheap again (Korthikanti et al. 2022,
    section 5, by operator). none: keeps everything. Loss and gradients are the same bit for bit.

    Raises ConfigError for a model whose layers transformers cannot checkpoint.
    """
    layers = [layer for layer in unwrap(model).modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers and mode != "none":
        raise ConfigError(
            f"train.activation_checkpointing {mode}: {type(unwrap(model)).__name__} has no layers that can "
            f"be checkpointed",
            fix="use activation_checkpointing: none and a smaller micro_batch_size",
        )
    for layer in layers:
        layer.gradient_checkpointing = mode != "none"
        layer._gradient_checkpointing_func = _checkpointing(mode)
    return len(layers)


def _checkpointing(mode: str) -> Callable[..., Any]:
    if mode == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
        return functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    return functools.partial(checkpoint, use_reentrant=False)


def _policy(_context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if not isinstance(operator, torch._ops.OpOverload):
        return CheckpointPolicy.MUST_SAVE  # flex attention and other operators of a higher order
    # Attention with dropout runs again: kept, it would not draw its random numbers, and everything random
    # after it would draw others than the first time.
    if operator._schema.name in _KEPT and not _draws(operator, args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _draws(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for position, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else argument.default_value
            return bool(kwargs.get("dropout_p", given))
    return False
