"""Context parallelism: every process has some of the positions of a sequence.

Queries stay where they are, keys and values are gathered for each layer. A process has the r-th and the r-th
but last of 2c equal pieces of a sequence, so that all have the same share of the causal half (Dubey et al.
2024, "The Llama 3 herd of models", section 3.3.2). Packed documents stay apart: the mask is made of their
numbers, for the positions of this process alone.

Shape suffixes: B rows, T positions of a row, Q those of this process, H heads, D size of a head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hearth.errors import ConfigError
from hearth.parallel.exchange import Group
from hearth.parallel.world import World

NAME = "hearth_context"


class _GatherPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHQD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x_BHQD, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x_BHQD.contiguous(), group=group)
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size(), dim=2)[ctx.group.rank()], None


def own_positions(length: int, size: int, rank: int) -> Tensor:
    """The positions of a process, in order. ``length`` is a multiple of ``2 * size``."""
    pieces = torch.arange(length).chunk(2 * size)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


class ContextParallel:
    """Attention over positions that are spread over a group of processes."""

    def __init__(self, model: nn.Module, world: World, sequence_length: int) -> None:
        """Give the model this attention. Raises ConfigError where it cannot, or lengths do not divide."""
        assert world.mesh is not None
        self._group = world.mesh.get_group("context")
        self._size, self._rank = world.layout.context, world.layout.coordinates(world.rank)["context"]
        if sequence_length % (2 * self._size):
            raise ConfigError(
                f"data.sequence_length {sequence_length} is not a multiple of 2 x parallel.context "
                f"{self._size}",
                fix=f"use a multiple of {2 * self._size}",
            )
        self._segments_BT: Tensor | None = None
        self._order_T = torch.cat([own_positions(sequence_length, self._size, r) for r in range(self._size)])
        self.positions_Q = own_positions(sequence_length, self._size, self._rank)
        self._install(model)

    def _install(self, model: Any) -> None:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)
        try:
            model.set_attn_implementation(NAME)
        except ValueError as error:
            raise ConfigError(
                f"parallel.context: {type(model).__name__} takes no other attention ({error})",
                fix="use parallel.shard for this family",
            ) from error

    def begin(self, segment_ids_BT: Tensor) -> None:
        """Which document each position of the next micro-batch belongs to; all of its positions."""
        self._segments_BT = segment_ids_BT

    def _mask(self, window: int | None) -> Tensor:
        assert self._segments_BT is not None, "a model under context parallelism runs through its trainer"
        segments_BT = self._segments_BT
        order_T, own_Q = self._order_T.to(segments_BT.device), self.positions_Q.to(segments_BT.device)
        distance_QT = own_Q[:, None] - order_T[None]
        seen_QT = distance_QT >= 0
        if window is not None:
            seen_QT &= distance_QT < window
        same_BQT = segments_BT[:, own_Q, None] == segments_BT[:, None, order_T]
        return (same_BQT & seen_QT)[:, None]

    def _attend(
        self,
        module: nn.Module,
        query_BHQD: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG002 - made here
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        for name in ("softcap", "s_aux"):
            if others.get(name) is not None:
                raise ConfigError(
                    f"parallel.context: the attention of this model has {name}, which it does not compute",
                    fix="use parallel.shard for this family",
                )
        gather = cast(Any, _GatherPositions).apply
        out_BHQD = F.scaled_dot_product_attention(
            query_BHQD,
            gather(key, self._group),
            gather(value, self._group),
            attn_mask=self._mask(sliding_window),
            dropout_p=dropout if module.training else 0.0,
            scale=scaling,
            enable_gqa=key.shape[1] != query_BHQD.shape[1],
        )
        return out_BHQD.transpose(1, 2).contiguous(), None
