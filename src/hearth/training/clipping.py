"""The norm of all gradients, and clipping by it, where weights are spread in different ways.

torch's own function stacks the norms of all tensors, which fails for DTensors of different meshes and is
wrong beside plain tensors. Here every tensor gives the sum of the squares of what is stored in this process;
sums of tensors that are spread over the same dimensions of the same mesh are added up over those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a float64 scalar that is the same in every process.

    A replicated gradient counts once; a partial one is summed up before its norm is taken. All processes
    must give the same gradients in the same order. A DTensor's processes outside of its mesh are not asked.
    """
    spread: dict[tuple[object, ...], list[Tensor]] = {}
    examples: dict[tuple[object, ...], DTensor] = {}
    for gradient in gradients:
        key: tuple[object, ...] = ()
        if _is_spread(gradient):
            whole = _without_partial(gradient)
            # Not `is_shard`: it denies the strided shards of FSDP2 over tensor parallelism.
            split = tuple(d for d, p in enumerate(whole.placements) if not p.is_replicate())
            key = (id(whole.device_mesh), split)
            examples[key] = whole
            gradient = whole.to_local()
        spread.setdefault(key, []).append(gradient)
    squares = [_reduce(_sum_of_squares(tensors), examples.get(key), key) for key, tensors in spread.items()]
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def clip_by_norm(gradients: Iterable[Tensor], largest: float, norm: Tensor) -> None:
    """Scale all gradients in place so that ``norm``, their total, becomes ``largest`` if it is more."""
    scale(gradients, torch.clamp(largest / (norm + 1e-6), max=1.0))


def scale(gradients: Iterable[Tensor], factor: Tensor | float) -> None:
    """Multiply all gradients in place; each process what it stores."""
    with torch.no_grad():
        for tensors in _by_device(local(gradient) for gradient in gradients):
            if isinstance(factor, Tensor):
                torch._foreach_mul_(tensors, factor.to(tensors[0].device, torch.float32))
            else:
                torch._foreach_mul_(tensors, factor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process stores; shares its memory."""
    return tensor.to_local() if _is_spread(tensor) else tensor


def _is_spread(tensor: Tensor) -> TypeGuard[DTensor]:
    # A plain tensor's process may have no torch.distributed at all; asking its type does not import it.
    return hasattr(tensor, "device_mesh")


def _without_partial(gradient: DTensor) -> DTensor:
    from torch.distributed.tensor import Replicate

    if not any(placement.is_partial() for placement in gradient.placements):
        return gradient
    placements = [Replicate() if p.is_partial() else p for p in gradient.placements]
    return gradient.redistribute(placements=placements)


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    total: Tensor | None = None
    for group in _by_device(tensors):
        # float32 norms of half-precision tensors, so that large ones do not overflow.
        dtype = None if group[0].dtype == torch.float64 else torch.float32
        norms = torch._foreach_norm(group, 2.0, dtype=dtype)
        part = torch.stack(norms).double().square().sum()
        total = part if total is None else total + part.to(total.device)
    assert total is not None
    return total


def _by_device(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())


def _reduce(square: Tensor, example: DTensor | None, key: tuple[object, ...]) -> Tensor:
    if example is None:
        return square
    import torch.distributed as dist

    dimensions = key[1]
    assert isinstance(dimensions, tuple)
    for dimension in dimensions:
        dist.all_reduce(square, group=example.device_mesh.get_group(dimension))
    return square
