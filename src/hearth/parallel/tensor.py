"""Tensor parallelism: every process has a part of each matrix, by the plan that comes with the model.

transformers says for each family which matrices are cut by columns and which by rows
(``base_model_tp_plan``). Here those plans are data: weights become DTensors, and a module computes with its
own part, as it is written, between two exchanges with the others. Activations between the matrices are the
same in all processes, and so are the gradients of what is not cut, but for those that say otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.parallel.blocks import find_blocks, norms_between, styles_within, wrap_blocks, wrap_layers
from hearth.parallel.checks import TENSOR_FAMILIES
from hearth.parallel.exchange import Bound, Group, add_up, copy_to, own_weights, scatter_sum
from hearth.parallel.styles import LEFT_OUT, STYLES, Style
from hearth.parallel.vocabulary import cut_vocabulary
from hearth.parallel.world import World


def apply_tensor_parallel(model: nn.Module, world: World, section: ParallelSection) -> None:
    """Cut a transformers model over the processes of ``tensor``.

    Raises ConfigError for a model without a plan, one whose plan has styles that are not known or fits no
    module, and sizes that do not divide.
    """
    assert world.mesh is not None
    mesh = world.mesh["tensor"]
    base: Any = getattr(model, "base_model", model)
    plan = require_plan(model, world.layout.tensor)
    modules = dict(base.named_modules())
    styles: dict[str, Style] = {}
    for pattern, name in plan.items():
        matching = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        styles |= {path: STYLES[name] for path in modules if matching.fullmatch(path)}
        for path, module in modules.items():
            for own in list(module._parameters):
                if matching.fullmatch(f"{path}.{own}"):
                    _cut_weight(module, own, STYLES[name], mesh)
    if not styles:
        raise ConfigError(
            f"parallel.tensor: the plan of {type(base).__name__} names none of its modules",
            fix="use parallel.shard for this family",
        )
    cut_vocabulary(model, mesh)
    layers = _layers(base)
    blocks = find_blocks(layers, styles)
    styles = styles_within(blocks, styles, sequence=section.sequence)
    if section.sequence:
        styles |= dict.fromkeys(norms_between(layers), Style(sum_gradients=True))
        wrap_layers(layers, section, mesh.get_group())
    for path, style in styles.items():
        _cut_module(modules[path], style, mesh)
    wrap_blocks(blocks, mesh.get_group(), sequence=section.sequence)


def _layers(base: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers of a model by their paths, in order."""
    layers = getattr(base, "layers", None)
    found = layers.named_children() if isinstance(layers, nn.ModuleList) else ()
    return {f"layers.{name}": layer for name, layer in found}


def require_plan(model: nn.Module, size: int) -> dict[str, str]:
    """How each module is cut over ``size`` processes, by patterns of names; for the meta device, too.

    Raises ConfigError for what `apply_tensor_parallel` cannot cut.
    """
    plan = _plan_of(model, getattr(model, "base_model", model))
    _require_divisible(model, size)
    return plan


def _plan_of(model: nn.Module, base: Any) -> dict[str, str]:
    kind = type(base).__name__
    plan: dict[str, str] | None = getattr(base.config.get_text_config(), "base_model_tp_plan", None)
    if not plan:
        raise ConfigError(
            f"parallel.tensor: {kind} has no plan for tensor parallelism",
            fix="use parallel.shard for this family",
        )
    family = base.config.get_text_config().model_type
    if family not in TENSOR_FAMILIES:  # a plan may leave weights out, whose gradients would be wrong
        raise ConfigError(
            f"parallel.tensor: {family} is none of the families that were found to compute the same so: "
            f"{', '.join(sorted(TENSOR_FAMILIES))}",
            fix="use parallel.shard for this family",
        )
    unknown = sorted(set(plan.values()) - set(STYLES))
    if unknown:
        raise ConfigError(
            f"parallel.tensor: the plan of {kind} has {', '.join(unknown)}, known are {', '.join(STYLES)}",
            fix="use parallel.shard for this family",
        )
    if hasattr(model, "peft_config"):
        raise ConfigError(
            "parallel.tensor does not cut adapters", fix="use parallel.shard, or train without model.adapter"
        )
    return {**plan, **LEFT_OUT.get(base.config.get_text_config().model_type, {})}


def _require_divisible(model: nn.Module, size: int) -> None:
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value % size:
            raise ConfigError(
                f"parallel.tensor {size} does not divide {key} {value} of the model",
                fix="use parallel.shard" + (f", or a tensor that divides {value}" if value > 1 else ""),
            )


def _cut_weight(module: nn.Module, name: str, style: Style, mesh: Any) -> None:
    weight = module._parameters[name]
    placement = None if weight is None else style.placement(weight)
    if weight is None or placement is None or isinstance(weight, DTensor):
        return
    cut = distribute_tensor(weight.data, mesh, [placement], src_data_rank=None)
    module._parameters[name] = nn.Parameter(cut, requires_grad=weight.requires_grad)


def _cut_module(module: nn.Module, style: Style, mesh: Any) -> None:
    group = mesh.get_group()
    for name in list(module._parameters):
        _cut_weight(module, name, style, mesh)
    module.forward = Bound(_with_own_part, module, style, group)


def _with_own_part(
    module: nn.Module, forward: Callable[..., Any], style: Style, group: Group, x: Tensor, *others: Any
) -> Any:
    """``forward`` between the exchanges of a style, with the local parts of the weights."""
    # A bias that every process has is added once, after the sum; where that is of its positions alone the
    # bias has a part of its gradient there.
    bias = module._parameters.get("bias") if style.after in (add_up, scatter_sum) else None
    added = copy_to(bias, group) if bias is not None and style.after is scatter_sum else bias
    with own_weights(module) as weights:
        for name, weight in weights.items():
            if style.sum_gradients and weight is not None:
                weights[name] = copy_to(weight, group)
        if bias is not None:
            weights["bias"] = None
        # Weights of the experts (routing) are used in part, too.
        others = tuple(_exchanged(other, style, group) for other in others)
        found = style.after(forward(style.before(x, group), *others), group)
    return found if added is None else found + added


def _exchanged(value: Any, style: Style, group: Group) -> Any:
    differentiable = isinstance(value, Tensor) and value.is_floating_point()
    return style.before(value, group) if differentiable and style.before is copy_to else value


def gathered(weight: Tensor) -> Tensor:
    """The whole of a weight, wherever its parts are; all processes must ask."""
    with torch.no_grad():
        return weight.full_tensor() if isinstance(weight, DTensor) else weight
