"""The keys and values of one attention layer, and the function that transformers calls instead of its own.

Legend: T query tokens of the step, H query heads, K KV heads, D/E key and value dims, S tokens in a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hearth.engine.attention.step import StepContext
from hearth.errors import ConfigError

if TYPE_CHECKING:
    from hearth.engine.attention.native_path import NativeLayer

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

    def bytes_per_token(self, dtype: torch.dtype, kv_dtype: str = "auto") -> int:
        """Bytes of one token's keys and values, in the model's dtype or in 8 bits with two float32 scales."""
        if kv_dtype != "auto":
            return self.num_kv_heads * (self.key_dim + self.value_dim + 2 * torch.float32.itemsize)
        return self.num_kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


@dataclass(frozen=True)
class Pool:
    """The memory of one layer's blocks; the first dimension of every tensor is the block.

    Keys [blocks, K, S, D] and values [blocks, K, S, E]; for the compiled kernels as attention.h says. 8-bit
    ones have a float32 scale for each token and head, [blocks, K, S]: x = scale * q.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @property
    def parts(self) -> list[torch.Tensor]:
        every = (self.keys, self.values, self.key_scales, self.value_scales)
        return [part for part in every if part is not None]


class Attend(Protocol):
    """Store the step's keys and values, then attend; returns [T, H, E]."""

    def __call__(
        self,
        step: StepContext,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKE: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor: ...


class LayerKV:
    """The paged keys and values of one layer, and the way to attend to them.

    path: "triton", "native", "numba" or "torch", see `choice.choose_path`. kv_dtype: "auto", "int8" or "fp8".
    Raises `ConfigError` for "fp8" on a path other than Triton's.
    """

    def __init__(
        self,
        spec: LayerSpec,
        step: StepContext,
        num_blocks: int,
        dtype: torch.dtype,
        *,
        path: str,
        kv_dtype: str = "auto",
    ) -> None:
        if kv_dtype == "fp8" and path != "triton":
            raise ConfigError(
                f"kv_dtype is 'fp8', which {path} attention does not store", fix="use kv_dtype auto or int8"
            )
        self.spec, self.step, self.path = spec, step, path
        self.num_blocks = num_blocks
        self._dtype, self._kv_dtype = dtype, kv_dtype
        self.renew()

    def renew(self) -> None:
        """Forget all keys and values. On a CPU the new blocks take no memory until they are written."""
        self.pool = _make_pool(
            self.spec, self.step, self.num_blocks, self._dtype, path=self.path, kv_dtype=self._kv_dtype
        )
        self._attend: Attend = _make_attend(self.path)(self.spec, self.pool, self.step.block_size)

    @property
    def attention_name(self) -> str:
        """What computes this layer: "native-amx", "native-avx512", "triton", "numba" or "torch"."""
        if self.path != "native":
            return self.path
        from hearth.engine.native import library

        native = library()
        return f"native-{native.isa if native else ''}"

    @property
    def native(self) -> NativeLayer | None:
        """The arguments to the compiled kernels, if they compute this layer."""
        from hearth.engine.attention.native_path import NativeLayer

        return self._attend if isinstance(self._attend, NativeLayer) else None

    def attend(
        self,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKE: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend; returns [T, H, E]."""
        return self._attend(self.step, query_THD, key_TKD, value_TKE, sinks_H)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.pool.parts)

    def read_blocks(self, block_ids: Sequence[int]) -> torch.Tensor:
        """A copy of the raw content of these blocks, uint8 [n, bytes of a block], on the device."""
        ids = torch.tensor(block_ids, dtype=torch.long, device=self.step.device)
        return torch.cat([part[ids].flatten(1).view(torch.uint8) for part in self.pool.parts], dim=1)

    def write_blocks(self, block_ids: Sequence[int], content: torch.Tensor) -> None:
        """Overwrite blocks with what `read_blocks` gave, of this layer or of one with the same spec."""
        ids = torch.tensor(block_ids, dtype=torch.long, device=self.step.device)
        content = content.to(self.step.device)
        first = 0
        for part in self.pool.parts:
            width = part[0].nbytes
            piece = content[:, first : first + width].contiguous().view(part.dtype)
            part[ids] = piece.view(-1, *part.shape[1:])
            first += width
        assert first == content.shape[1], "content of blocks of another shape"


def _make_pool(
    spec: LayerSpec, step: StepContext, num_blocks: int, dtype: torch.dtype, *, path: str, kv_dtype: str
) -> Pool:
    K, S = spec.num_kv_heads, step.block_size
    key_shape: tuple[int, ...] = (K, S, spec.key_dim)
    value_shape: tuple[int, ...] = (K, S, spec.value_dim)
    if path == "native":
        from hearth.engine.attention.native_path import pool_shapes

        key_shape, value_shape = pool_shapes(spec, S)
    stored = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(kv_dtype, dtype)

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return _zeros((num_blocks, *shape), dtype, step.device)

    scales = [zeros((K, S), torch.float32) for _ in range(2)] if kv_dtype != "auto" else [None, None]
    return Pool(zeros(key_shape, stored), zeros(value_shape, stored), *scales)


def _make_attend(path: str) -> Callable[[LayerSpec, Pool, int], Attend]:
    if path == "native":
        from hearth.engine.attention.native_path import NativeLayer

        return NativeLayer
    if path == "numba":
        from hearth.engine.attention.numba_path import NumbaLayer

        return NumbaLayer
    if path == "triton":
        from hearth.engine.attention.triton_path import TritonLayer

        return TritonLayer
    from hearth.engine.attention.torch_path import TorchLayer

    return TorchLayer


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
