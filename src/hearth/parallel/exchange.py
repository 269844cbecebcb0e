"""What passes between the processes of a group within a model, in both directions of differentiation.

Megatron's f and g (Shoeybi et al. 2019, section 3): what is copied forward is added up backward, and the
other way round.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _added_up(grads[0], ctx.group), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # noqa: ARG004
        return _added_up(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _part(grads[0], ctx.group), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _part(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.group), None


def copy_to(x: Tensor, group: Group) -> Tensor:
    """The same in every process; its gradients are added up."""
    return cast(Tensor, cast(Any, _Copy).apply(x, group))


def add_up(x: Tensor, group: Group) -> Tensor:
    """The sum over the processes; its gradient goes to each."""
    return cast(Tensor, cast(Any, _AddUp).apply(x, group))


def gather_last(x: Tensor, group: Group) -> Tensor:
    """The parts of all processes, one after the other in the last dimension."""
    return cast(Tensor, cast(Any, _Gather).apply(x, group))


def split_last(x: Tensor, group: Group) -> Tensor:
    """This process's part of the last dimension of what all have."""
    return cast(Tensor, cast(Any, _Split).apply(x, group))


def _added_up(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gathered(x: Tensor, group: Group) -> Tensor:
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _part(x: Tensor, group: Group) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim=-1)[dist.get_rank(group)].contiguous()
