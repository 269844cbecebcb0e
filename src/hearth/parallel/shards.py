"""Which part of a tensor a process has, and who writes it down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from hearth.parallel.layout import DIMENSIONS
from hearth.parallel.world import World

# Dimensions of meshes that stand for several of a layout.
MADE_OF = {
    "shard_context": ("shard", "context"),
    "replicas": ("data", "shard", "context"),
    "replica": ("data", "shard"),
    "expert": ("data", "shard"),
}


@dataclass(frozen=True)
class Part:
    """A box of a tensor: ``local`` begins at ``offset`` in a whole of ``shape``."""

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing else."""
        return tuple(self.local.shape) == self.shape


def part_to_write(tensor: Tensor, world: World) -> Part | None:
    """What this process writes of a tensor; None where another one writes the same.

    All processes must ask for all of their tensors, in the same order: what is cut into more than one box is
    gathered first.
    """
    if not isinstance(tensor, DTensor):
        return _whole(tensor) if _is_first(world, DIMENSIONS[1:]) else None
    if in_pieces(tensor):
        gathered = tensor.full_tensor()
        return _whole(gathered) if _is_first(world, DIMENSIONS[1:]) else None
    mesh, placements = tensor.device_mesh, tensor.placements
    names = mesh.mesh_dim_names or ()
    covered = {own for name in names for own in MADE_OF.get(name, (name,))}
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    first = all(
        at == 0 for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate()
    )
    if not first or not _is_first(world, [name for name in DIMENSIONS[1:] if name not in covered]):
        return None
    local_shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = tensor.to_local()
    assert tuple(local.shape) == tuple(local_shape), "a tensor of this layout is not one box"
    return Part(local, tuple(tensor.shape), tuple(offset)) if local.numel() else None


def own_box(tensor: Tensor) -> tuple[slice, ...] | None:
    """Where in the whole this process's part of a tensor is; None where that is more than one box."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    if in_pieces(tensor):
        return None
    sizes, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True))


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor that may still be on the disk."""
    shapes: Mapping[str, tuple[int, ...]] | None = getattr(tensors, "shapes", None)
    return tuple(tensors[name].shape) if shapes is None else shapes[name]


def taken(tensors: Mapping[str, Tensor], name: str, own: Tensor) -> Tensor:
    """A tensor, spread as ``own`` is. Of one that is on the disk no more is read than this process has."""
    read = getattr(tensors, "read", None)
    box = own_box(own)
    if read is None or box is None or not isinstance(own, DTensor):
        return like(tensors[name], own)
    return DTensor.from_local(
        read(name, box).to(own.device),
        own.device_mesh,
        own.placements,
        run_check=False,
        shape=own.shape,
        stride=own.stride(),
    )


def like(whole: Tensor, own: Tensor) -> Tensor:
    """``whole``, spread as ``own`` is; nothing is sent."""
    if not isinstance(own, DTensor):
        return whole.to(own.device)
    with torch.no_grad():
        return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _whole(tensor: Tensor) -> Part:
    return Part(tensor, tuple(tensor.shape), (0,) * tensor.ndim)


def _is_first(world: World, names: list[str] | tuple[str, ...]) -> bool:
    at = world.layout.coordinates(world.rank)
    return all(at[name] == 0 for name in names)


def in_pieces(tensor: DTensor) -> bool:
    """Whether a process has several boxes: of matrices that are packed into one."""
    for index, placement in enumerate(tensor.placements):
        if isinstance(placement, _StridedShard):
            # FSDP2 over tensor parallelism is strided, too, by as much as the later dimensions divide.
            later = tensor.placements[index + 1 :]
            sizes = [
                tensor.device_mesh.size(index + 1 + number)
                for number, other in enumerate(later)
                if getattr(other, "dim", None) == placement.dim
            ]
            divided = 1
            for size in sizes:
                divided *= size
            if placement.split_factor != divided:
                return True
    return False
