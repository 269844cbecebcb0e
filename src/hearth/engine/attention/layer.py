"""The keys and values of one attention layer, and the function that transformers calls instead of its own.

Legend: T query tokens of the step, H query heads, K KV heads, D/E key and value dims, S tokens in a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hearth.engine.attention.step import StepContext

NAME = "hearth_paged"
SLOT = "_hearth_kv"  # the attribute of an attention module that holds its LayerKV

# What models pass to the attention interface and what paged attention knows to handle or may ignore.
KNOWN_ARGUMENTS = frozenset(
    [
        "dropout",
        "scaling",
        "sliding_window",
        "softcap",
        "s_aux",
        "is_causal",
        "position_ids",
        "use_cache",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "output_router_logits",
        "logits_to_keep",
        "position_embeddings",
        "layer_idx",
        "num_items_in_batch",
        "past_key_values",
        "token_type_ids",
    ]
)


@dataclass(frozen=True)
class LayerSpec:
    """The shape and the rules of one attention layer, read from a dry forward."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int = 0  # tokens that a query sees, itself included; 0 = all
    softcap: float = 0.0
    sinks: bool = False

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class LayerKV:
    """The paged keys and values of one layer: [blocks, K, S, D] and [blocks, K, S, E]."""

    def __init__(
        self, spec: LayerSpec, step: StepContext, num_blocks: int, dtype: torch.dtype, *, numba: bool
    ) -> None:
        self.spec = spec
        self.step = step
        size = step.block_size
        self.keys = _zeros((num_blocks, spec.num_kv_heads, size, spec.key_dim), dtype, step.device)
        self.values = _zeros((num_blocks, spec.num_kv_heads, size, spec.value_dim), dtype, step.device)
        self.use_numba = numba
        if numba:
            from hearth.engine.attention.numba_path import NumbaLayer

            self.numba_layer = NumbaLayer(spec, self.keys, self.values)

    @property
    def _parts(self) -> tuple[torch.Tensor, ...]:
        """Everything that belongs to a block; the first dimension of each tensor is the block."""
        return (self.keys, self.values)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        """A copy of the raw content of these blocks, uint8 [n, bytes of a block], on the device."""
        ids = torch.tensor(block_ids, dtype=torch.long, device=self.keys.device)
        return torch.cat([part[ids].flatten(1).view(torch.uint8) for part in self._parts], dim=1)

    def write_blocks(self, block_ids: Sequence[int], content: torch.Tensor) -> None:
        """Overwrite blocks with what `read_blocks` gave, of this layer or of one with the same spec."""
        ids = torch.tensor(block_ids, dtype=torch.long, device=self.keys.device)
        content = content.to(self.keys.device)
        first = 0
        for part in self._parts:
            width = part[0].nbytes
            piece = content[:, first : first + width].contiguous().view(part.dtype)
            part[ids] = piece.view(-1, *part.shape[1:])
            first += width
        assert first == content.shape[1], "content of blocks of another shape"

    def attend(
        self,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKE: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend; returns [T, H, E]."""
        if self.use_numba:
            return self.numba_layer(self.step, query_THD, key_TKD, value_TKE, sinks_H)
        from hearth.engine.attention.torch_path import attend, store

        store(self.step, self.keys, self.values, key_TKD, value_TKE)
        return attend(self.step, self.spec, self.keys, self.values, query_THD, sinks_H)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU the operating system provides the pages only when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, K, T, D]
    value: torch.Tensor,  # [1, K, T, E]
    attention_mask: torch.Tensor | None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; returns [1, T, H, E]. Masks are the layer's own business."""
    del attention_mask, kwargs
    layer: LayerKV = getattr(module, SLOT)
    out_THE = layer.attend(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), s_aux)
    return out_THE.unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(NAME, paged_attention)
