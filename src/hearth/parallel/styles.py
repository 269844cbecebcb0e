"""How the matrices of a plan for tensor parallelism are cut, and what processes exchange around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from hearth.parallel.exchange import Group, add_up, copy_to, gather_last, split_last

Exchange = Callable[[Tensor, Group], Tensor]


def as_is(x: Tensor, group: Group) -> Tensor:  # noqa: ARG001
    """Nothing is exchanged."""
    return x


@dataclass(frozen=True)
class Style:
    """How one module is cut. ``dimension`` of its matrices, counted from the end; None cuts nothing."""

    dimension: int | None = None
    packed: bool = False  # two matrices in one, of which every process has a part of each
    before: Exchange = as_is
    after: Exchange = as_is
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

# Weights that the plans of transformers leave out, though processes use them for their part alone, by family.
LEFT_OUT: Mapping[str, Mapping[str, str]] = {
    "apertus": {"layers.*.mlp.act_fn": "replicated_with_grad_allreduce"},
}
