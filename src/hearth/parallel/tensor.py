"""Tensor parallelism: every process has a part of each matrix, by the plan that comes with the model.

transformers says for each family which matrices are cut by columns and which by rows
(``base_model_tp_plan``). Here those plans are data: weights become DTensors, and a module computes with its
own part, as it is written, between two exchanges with the others. Activations between the matrices are the
same in all processes, and so are the gradients of what is not cut, but for those that say otherwise.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from hearth.errors import ConfigError
from hearth.parallel.exchange import Group, add_up, copy_to, gather_last, split_last
from hearth.parallel.world import World

Exchange = Callable[[Tensor, Group], Tensor]


def _as_is(x: Tensor, group: Group) -> Tensor:  # noqa: ARG001
    return x


@dataclass(frozen=True)
class Style:
    """How one module is cut. ``dimension`` of its matrices, counted from the end; None cuts nothing."""

    dimension: int | None = None
    packed: bool = False  # two matrices in one, of which every process has a part of each
    before: Exchange = _as_is
    after: Exchange = _as_is
    sum_gradients: bool = False  # of weights that every process has, but uses for its part alone

    def placement(self, weight: Tensor) -> Placement | None:
        """How a weight of this module is cut; None: every process has it all."""
        if self.dimension is None or (weight.ndim == 1 and self.dimension == -1):
            return None
        dimension = weight.ndim - 1 if weight.ndim == 1 else weight.ndim + self.dimension
        return _StridedShard(dimension, split_factor=2) if self.packed else Shard(dimension)


STYLES: Mapping[str, Style] = {
    "colwise": Style(-2, before=copy_to),
    "rowwise": Style(-1, after=add_up),
    "packed_colwise": Style(-2, packed=True, before=copy_to),
    "packed_rowwise": Style(-1, packed=True, after=add_up),
    "colwise_gather_output": Style(-2, before=copy_to, after=gather_last),
    "rowwise_split_input": Style(-1, before=split_last, after=add_up),
    "moe_tp_experts": Style(before=copy_to, after=add_up),
    "replicated_with_grad_allreduce": Style(sum_gradients=True),
    "replicate": Style(),
}


def apply_tensor_parallel(model: nn.Module, world: World) -> None:
    """Cut a transformers model over the processes of ``tensor``. The output layer stays whole.

    Raises ConfigError for a model without a plan, one whose plan has styles that are not known, and sizes
    that do not divide.
    """
    assert world.mesh is not None
    mesh = world.mesh["tensor"]
    base: Any = getattr(model, "base_model", model)
    plan = _plan_of(model, base)
    _require_divisible(model, world.layout.tensor)
    modules = dict(base.named_modules())
    for pattern, name in plan.items():
        matching = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        for path in (path for path in modules if matching.fullmatch(path)):
            _cut_module(modules[path], STYLES[name], mesh)
        for path, module in modules.items():
            for own in list(module._parameters):
                if matching.fullmatch(f"{path}.{own}"):
                    _cut_weight(module, own, STYLES[name], mesh)


def _plan_of(model: nn.Module, base: Any) -> dict[str, str]:
    kind = type(base).__name__
    plan: dict[str, str] | None = getattr(base.config.get_text_config(), "base_model_tp_plan", None)
    if not plan:
        raise ConfigError(
            f"parallel.tensor: {kind} has no plan for tensor parallelism",
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
    return plan


def _require_divisible(model: nn.Module, size: int) -> None:
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value % size:
            raise ConfigError(
                f"parallel.tensor {size} does not divide {key} {value} of the model",
                fix=f"use a tensor that divides {value}, or parallel.shard",
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
    module.forward = functools.partial(_with_own_part, module, module.forward, style, group)


def _with_own_part(
    module: nn.Module, forward: Callable[..., Any], style: Style, group: Group, x: Tensor, *others: Any
) -> Any:
    """``forward`` between the exchanges of a style, with the local parts of the weights."""
    whole: dict[str, Any] = dict(module._parameters)
    # A bias that every process has is added once, after the sum.
    bias = whole.get("bias") if style.after is add_up else None
    weights: Any = module._parameters
    try:
        for name, weight in whole.items():
            if isinstance(weight, DTensor):
                weights[name] = weight.to_local()
            elif style.sum_gradients and weight is not None:
                weights[name] = copy_to(weight, group)
        if bias is not None:
            weights["bias"] = None
        # Weights of the experts (routing) are used in part, too.
        others = tuple(_exchanged(other, style, group) for other in others)
        found = style.after(forward(style.before(x, group), *others), group)
    finally:
        module._parameters.update(whole)
    return found if bias is None else found + bias


def _exchanged(value: Any, style: Style, group: Group) -> Any:
    differentiable = isinstance(value, Tensor) and value.is_floating_point()
    return style.before(value, group) if differentiable and style.before is copy_to else value


def gathered(weight: Tensor) -> Tensor:
    """The whole of a weight, wherever its parts are; all processes must ask."""
    with torch.no_grad():
        return weight.full_tensor() if isinstance(weight, DTensor) else weight
