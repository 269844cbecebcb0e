"""What passes between the processes of a group within a model, in both directions of differentiation.

Megatron's f and g (Shoeybi et al. 2019, section 3): what is copied forward is added up backward, and the
other way round. Shape suffixes: B rows, T all positions, P those of one process, D hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Group = Any


class Bound:
    """Stands for a module's forward pass: ``run(module, forward, *about, *inputs)``.

    It goes with the module into a copy; what it is about (groups of processes) is the same there.
    """

    def __init__(self, run: Callable[..., Any], module: nn.Module, *about: Any) -> None:
        self._run, self._module, self._about = run, module, about
        # A method of the class, or what stood for the forward pass before.
        self._inner: Bound | None = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        forward = self._inner or functools.partial(type(self._module).forward, self._module)
        return self._run(self._module, forward, *self._about, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        found = copy.copy(self)
        memo[id(self)] = found
        found._module = copy.deepcopy(self._module, memo)
        found._inner = copy.deepcopy(self._inner, memo)
        return found


@contextlib.contextmanager
def own_weights(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Within, a module's weights are this process's parts of them, and may be replaced by others."""
    whole: dict[str, Any] = dict(module._parameters)
    weights: Any = module._parameters
    try:
        for name, weight in whole.items():
            if isinstance(weight, DTensor):
                weights[name] = weight.to_local()
        yield weights
    finally:
        weights.update(whole)


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
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return _part(grads[0], ctx.group, ctx.dim), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _part(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return _gathered(grads[0], ctx.group, ctx.dim), None, None


class _GatherToSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gathered(x, group, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _scattered_sum(grads[0], ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scattered_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.group, 1), None


def copy_to(x: Tensor, group: Group) -> Tensor:
    """The same in every process; its gradients are added up."""
    return cast(Tensor, cast(Any, _Copy).apply(x, group))


def add_up(x: Tensor, group: Group) -> Tensor:
    """The sum over the processes; its gradient goes to each."""
    return cast(Tensor, cast(Any, _AddUp).apply(x, group))


def gather_last(x: Tensor, group: Group) -> Tensor:
    """The parts of all processes, one after the other in the last dimension."""
    return cast(Tensor, cast(Any, _Gather).apply(x, group, -1))


def split_last(x: Tensor, group: Group) -> Tensor:
    """This process's part of the last dimension of what all have."""
    return cast(Tensor, cast(Any, _Split).apply(x, group, -1))


def gather_positions(x_BPD: Tensor, group: Group) -> Tensor:
    """All positions, of which each process has equally many; for what all compute alike."""
    return cast(Tensor, cast(Any, _Gather).apply(x_BPD, group, 1))


def split_positions(x_BTD: Tensor, group: Group) -> Tensor:
    """This process's positions of what all have."""
    return cast(Tensor, cast(Any, _Split).apply(x_BTD, group, 1))


def gather_to_sum(x_BPD: Tensor, group: Group) -> Tensor:
    """All positions, for what each process computes a summand of: gradients are added up."""
    return cast(Tensor, cast(Any, _GatherToSum).apply(x_BPD, group))


def scatter_sum(x_BTD: Tensor, group: Group) -> Tensor:
    """This process's positions of the sum over the processes."""
    return cast(Tensor, cast(Any, _ScatterSum).apply(x_BTD, group))


def _added_up(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gathered(x: Tensor, group: Group, dim: int) -> Tensor:
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def _part(x: Tensor, group: Group, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim=dim)[dist.get_rank(group)].contiguous()


def _scattered_sum(x_BTD: Tensor, group: Group) -> Tensor:
    parts = x_BTD.chunk(dist.get_world_size(group), dim=1)
    own = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    # The same under the names of different versions of torch.
    reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(own, torch.cat(parts), group=group)
    return own
