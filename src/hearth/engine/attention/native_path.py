"""Paged attention by the compiled kernels (AVX512-BF16, AMX). Layout and algorithm: `native/attention.h`.

Legend: T query tokens of the step, H query heads, K KV heads, D/E key and value dims.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import torch

from hearth.engine.attention.step import StepContext
from hearth.engine.native import library

if TYPE_CHECKING:
    from hearth.engine.attention.layer import LayerSpec, Pool

MULTIPLE = 32  # of block size and dims: a pair of matrix tiles


class Args(ctypes.Structure):
    """`AttentionArgs` of attention.h, member for member."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "key_dim", "value_dim")),
        ("block_size", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        ("num_tokens", ctypes.c_int32),
        ("num_sequences", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("slots", "starts", "counts", "firsts", "tables")),
        ("table_width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *((f"{name}_{part}", ctypes.c_int64) for name in ("query", "key", "value", "out")
          for part in ("stride", "head_stride")),
        ("workspace", ctypes.c_void_p),
    )  # fmt: skip


@functools.cache
def _functions() -> Any:
    native = library()
    assert native is not None, "no compiled kernels"
    lib = native.functions
    lib.hearth_attention_workspace.argtypes = [ctypes.POINTER(Args)]
    lib.hearth_attention_workspace.restype = ctypes.c_size_t
    lib.hearth_attention.argtypes = [ctypes.POINTER(Args), ctypes.c_int]
    return lib


def unsuited(spec: LayerSpec, block_size: int) -> str:
    """Why the kernels cannot compute this layer; empty if they can."""
    for name, size in (
        ("block size", block_size), ("key size", spec.key_dim), ("value size", spec.value_dim)
    ):  # fmt: skip
        if size % MULTIPLE:
            return f"its {name} is {size}, no multiple of {MULTIPLE}"
    return "" if spec.scale > 0 else f"its scale is {spec.scale:g}"


def pool_shapes(spec: LayerSpec, block_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a block of keys and of one of values."""
    K, S, D, E = spec.num_kv_heads, block_size, spec.key_dim, spec.value_dim
    return (K, D // 2, S, 2), (K, S // 2, E, 2)


class NativeLayer:
    """One layer's arguments to the kernels, of which only what belongs to the step is set anew."""

    def __init__(self, spec: LayerSpec, pool: Pool, block_size: int) -> None:
        self.pool = pool  # keeps alive what the pointers point to
        self.args = Args(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            key_dim=spec.key_dim,
            value_dim=spec.value_dim,
            block_size=block_size,
            window=spec.window,
            scale=spec.scale,
            softcap=spec.softcap,
            keys=pool.keys.data_ptr(),
            values=pool.values.data_ptr(),
            key_scales=None if pool.key_scales is None else pool.key_scales.data_ptr(),
            value_scales=None if pool.value_scales is None else pool.value_scales.data_ptr(),
        )
        self.sinks_H: torch.Tensor | None = None

    def __call__(
        self,
        step: StepContext,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKE: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend; returns [T, H, E]."""
        args, lib = self.args, _functions()
        if sinks_H is not None and self.sinks_H is None:
            self.sinks_H = sinks_H.detach().float().contiguous()
            args.sinks = self.sinks_H.data_ptr()
        out_THE = torch.empty(query_THD.shape[0], args.num_heads, args.value_dim, dtype=torch.bfloat16)
        self.fill_step(step)
        # The names keep a copy alive, where one had to be made.
        query = _rows(query_THD)
        key, value = _rows(key_TKD), _rows(value_TKE)
        args.query, args.query_stride, args.query_head_stride = query.data_ptr(), *query.stride()[:2]
        args.key, args.key_stride, args.key_head_stride = key.data_ptr(), *key.stride()[:2]
        args.value, args.value_stride, args.value_head_stride = value.data_ptr(), *value.stride()[:2]
        args.out, args.out_stride, args.out_head_stride = out_THE.data_ptr(), *out_THE.stride()[:2]
        lib.hearth_attention(ctypes.byref(args), torch.get_num_threads())
        return out_THE

    def fill_step(self, step: StepContext) -> None:
        """Set the members that describe the step; good until the step is filled anew."""
        args = self.args
        args.num_tokens, args.num_sequences = len(step.slots_np), len(step.starts_np)
        args.slots, args.starts = step.slots_np.ctypes.data, step.starts_np.ctypes.data
        args.counts, args.firsts = step.counts_np.ctypes.data, step.firsts_np.ctypes.data
        args.tables, args.table_width = step.tables_np.ctypes.data, step.tables_np.shape[1]
        shape = (args.num_heads, args.num_kv_heads, args.value_dim, args.block_size, args.window)

        def workspace_bytes() -> int:
            return int(_functions().hearth_attention_workspace(ctypes.byref(args)))

        args.workspace = step.workspace(step.cached(("workspace", shape), workspace_bytes))


def _rows(x_THD: torch.Tensor) -> torch.Tensor:
    return x_THD if x_THD.stride(2) == 1 else x_THD.contiguous()
