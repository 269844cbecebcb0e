"""Expert parallelism: every process of a group has some of the experts; tokens travel to theirs and back.

Lepikhin et al. 2020, "GShard", section 3: an all-to-all before the experts and one after. Works on modules of
transformers that hold the weights of all experts as one tensor and are called with the hidden states, the
chosen experts of each token and their weights. No token is dropped.

Shape suffixes: N tokens of this process, K experts a token, D hidden size, E experts, M tokens that arrived.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hearth.errors import ConfigError
from hearth.parallel.exchange import Group
from hearth.parallel.world import World


class _Exchange(torch.autograd.Function):
    """Rows to the processes that they are for; gradients the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        return _exchange(grads[0], received, sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent), group=group)
    return arrived


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold all experts of a layer, with weights whose first dimension counts experts."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "num_experts", None), int)
        and any(weight.ndim == 3 for weight in module.parameters(recurse=False))
    ]


def apply_expert_parallel(model: nn.Module, world: World) -> list[nn.Module]:
    """Spread the experts of every layer over the processes of ``expert``; the modules that hold them.

    Raises ConfigError for a model without such experts, and for a number that does not divide theirs.
    """
    assert world.expert_mesh is not None
    modules = expert_modules(model)
    size = world.layout.expert
    if not modules and world.layout.pipeline == 1:  # of a pipeline, some stages may have none
        raise ConfigError(
            f"parallel.expert {size}: the model has no experts that can be spread",
            fix="leave parallel.expert out, or use parallel.shard",
        )
    mesh = world.expert_mesh["expert"]
    for module in modules:
        num: Any = module.num_experts
        if num % size:
            raise ConfigError(
                f"parallel.expert {size} does not divide the {num} experts of the model",
                fix="use a number that does",
            )
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.shape[0] == num:
                own = distribute_tensor(weight.data, mesh, [Shard(0)], src_data_rank=None)
                module._parameters[name] = nn.Parameter(own, requires_grad=weight.requires_grad)
        each = num // size
        module.forward = functools.partial(_with_own_experts, module, module.forward, each, mesh.get_group())
    return modules


def _with_own_experts(
    module: nn.Module,
    forward: Callable[..., Tensor],
    each: int,
    group: Group,
    hidden_ND: Tensor,
    chosen_NK: Tensor,
    weights_NK: Tensor,
) -> Tensor:
    """What all experts make of these tokens, those of this process computed here."""
    num_ranks = dist.get_world_size(group)
    chosen, order = chosen_NK.reshape(-1).sort(stable=True)
    token = order // chosen_NK.shape[1]
    sent = chosen.div(each, rounding_mode="floor").bincount(minlength=num_ranks)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    sizes = sent.tolist(), received.tolist(), group
    exchange = cast(Any, _Exchange).apply
    arrived_MD = exchange(hidden_ND[token], *sizes)
    experts_M = _exchange(chosen % each, *sizes)
    made_MD = _compute(module, forward, each, arrived_MD, experts_M)
    back = exchange(made_MD, sizes[1], sizes[0], group)
    weighted = back * weights_NK.reshape(-1)[order, None]
    return torch.zeros_like(hidden_ND).index_add(0, token, weighted.to(hidden_ND.dtype))


def _compute(
    module: nn.Module, forward: Callable[..., Tensor], each: int, arrived_MD: Tensor, experts_M: Tensor
) -> Tensor:
    whole: dict[str, Any] = dict(module._parameters)
    num = cast(Any, module).num_experts
    weights: Any = module._parameters
    try:
        for name, weight in whole.items():
            if isinstance(weight, DTensor):
                weights[name] = weight.to_local()
        module.num_experts = each  # type: ignore[assignment]
        ones = arrived_MD.new_ones(len(arrived_MD), 1)
        return forward(arrived_MD, experts_M[:, None], ones)
    finally:
        module._parameters.update(whole)
        module.num_experts = num
