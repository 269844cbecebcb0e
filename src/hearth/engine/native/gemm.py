"""Linear layers by the compiled kernels: quantising, packing, the product. Layouts are described in gemm.h.

Legend: M rows of input, N outputs, K inputs of the layer, G groups of inputs.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hearth.engine.native.build import library
from hearth.engine.quantize import Int4Weight, Int8Weight

BF16, INT8, INT4 = 0, 1, 2
MAX_INPUTS = 65535  # of quantised weights: sums stay in int32
_ACCUMULATE, _OUT_F32 = 1, 2
_HUGE_PAGE = 1 << 21
_P, _I64, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@functools.cache
def functions() -> Any:
    """The library's functions with their argument types; call it only where `library` returns one."""
    native = library()
    assert native is not None, "no compiled kernels"
    lib = native.functions
    lib.hearth_packed_bytes.restype = _I64
    lib.hearth_packed_bytes.argtypes = [_I, _I64, _I64, _I]
    lib.hearth_advise_huge.argtypes = [_P, ctypes.c_size_t]
    lib.hearth_pack_bf16.argtypes = [_P, _I64, _I64, _I64, _P, _I]
    lib.hearth_pack_int8.argtypes = [_P, _I64, _I64, _P, _I]
    lib.hearth_pack_int4.argtypes = [_P, _P, _P, _I, _I64, _I64, _P, _I]
    lib.hearth_quantize_int8.argtypes = [_P, _I64, _I64, _I64, _P, _P, _I]
    lib.hearth_quantize_int4.argtypes = [_P, _I64, _I64, _I64, _I, _P, _P, _P, _P, _I]
    lib.hearth_gemm.argtypes = [
        _I, _I, _I, _I, _P, _I64, _P, _P, _P, _P, _I64, _I64, _I64, _I64
    ]  # fmt: skip
    return lib


@dataclass(frozen=True)
class NativeWeight:
    """A packed weight and what belongs to it; the product is float32 sums rounded once."""

    weight: torch.Tensor  # bytes
    scale: torch.Tensor | None  # float32 [N rounded up to 32]; quantised weights
    bias: torch.Tensor | None  # float32 [N]
    num_outputs: int
    num_inputs: int
    kind: int
    group: int = 64

    def multiply(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None = None,
        *,
        accumulate: bool = False,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        """x [..., K] bfloat16 -> [..., N] of ``out_dtype``.

        ``out`` [M, N], bfloat16 or float32, may have its rows apart; with ``accumulate`` the product is added
        to it.
        """
        assert x.dtype is torch.bfloat16
        assert x.shape[-1] == self.num_inputs
        x_MK = x.reshape(-1, self.num_inputs)
        if x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous()
        out_MN = torch.empty(len(x_MK), self.num_outputs, dtype=out_dtype) if out is None else out
        assert out_MN.shape == (len(x_MK), self.num_outputs)
        assert out_MN.stride(1) == 1
        flags = (_ACCUMULATE if accumulate else 0) | (_OUT_F32 if out_MN.dtype is torch.float32 else 0)
        functions().hearth_gemm(
            self.kind,
            self.group,
            flags,
            torch.get_num_threads(),
            x_MK.data_ptr(),
            x_MK.stride(0),
            self.weight.data_ptr(),
            None if self.scale is None else self.scale.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            out_MN.data_ptr(),
            out_MN.stride(0),
            len(x_MK),
            self.num_outputs,
            self.num_inputs,
        )
        return out_MN.view(*x.shape[:-1], self.num_outputs) if out is None else out


@torch.no_grad()
def pack_bf16(weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> NativeWeight:
    """Pack a bfloat16 weight; its rows may be apart, elements of a row not."""
    weight_NK = _rows(weight_NK)
    N, K = weight_NK.shape
    packed = _allocate(BF16, N, K, 64)
    functions().hearth_pack_bf16(
        weight_NK.data_ptr(), weight_NK.stride(0), N, K, packed.data_ptr(), torch.get_num_threads()
    )
    return NativeWeight(packed, None, _bias(bias_N), N, K, BF16)


@torch.no_grad()
def pack_int8(weight: Int8Weight, bias_N: torch.Tensor | None = None) -> NativeWeight:
    N, K = weight.codes_NK.shape
    assert K <= MAX_INPUTS
    packed = _allocate(INT8, N, K, 64)
    codes_NK = weight.codes_NK.contiguous()
    functions().hearth_pack_int8(codes_NK.data_ptr(), N, K, packed.data_ptr(), torch.get_num_threads())
    return NativeWeight(packed, _pad_scale(weight.scale_N), _bias(bias_N), N, K, INT8)


@torch.no_grad()
def pack_int4(weight: Int4Weight, bias_N: torch.Tensor | None = None) -> NativeWeight:
    N, depth = weight.nibbles_NK.shape
    assert weight.num_inputs <= MAX_INPUTS
    packed = _allocate(INT4, N, depth, weight.group)
    parts = [t.contiguous() for t in (weight.nibbles_NK, weight.mul_NG, weight.add_NG)]
    functions().hearth_pack_int4(
        *(t.data_ptr() for t in parts), weight.group, N, depth, packed.data_ptr(), torch.get_num_threads()
    )
    scale = _pad_scale(weight.scale_N)
    return NativeWeight(packed, scale, _bias(bias_N), N, weight.num_inputs, INT4, weight.group)


@torch.no_grad()
def quantize_int8(weight_NK: torch.Tensor) -> Int8Weight:
    """What `hearth.engine.quantize.quantize_int8` does, for bfloat16, faster."""
    weight_NK = _rows(weight_NK)
    N, K = weight_NK.shape
    codes_NK, scale_N = torch.empty(N, K, dtype=torch.int8), torch.empty(N)
    functions().hearth_quantize_int8(
        weight_NK.data_ptr(), weight_NK.stride(0), N, K, codes_NK.data_ptr(), scale_N.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return Int8Weight(codes_NK, scale_N)


@torch.no_grad()
def quantize_int4(weight_NK: torch.Tensor, group: int = 64) -> Int4Weight:
    """What `hearth.engine.quantize.quantize_int4` does, for bfloat16, much faster."""
    weight_NK = _rows(weight_NK)
    N, K = weight_NK.shape
    depth = -(-K // 64) * 64
    nibbles_NK = torch.empty(N, depth, dtype=torch.uint8)
    mul_NG, add_NG = (torch.empty(N, depth // group, dtype=torch.uint8) for _ in range(2))
    scale_N = torch.empty(N)
    functions().hearth_quantize_int4(
        weight_NK.data_ptr(), weight_NK.stride(0), N, K, group, nibbles_NK.data_ptr(), mul_NG.data_ptr(),
        add_NG.data_ptr(), scale_N.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return Int4Weight(nibbles_NK, mul_NG, add_NG, scale_N, group, K)


def _allocate(kind: int, num_outputs: int, num_inputs: int, group: int) -> torch.Tensor:
    return aligned_memory(functions().hearth_packed_bytes(kind, num_outputs, num_inputs, group))


def aligned_memory(num_bytes: int) -> torch.Tensor:
    """Bytes that begin at a cache line, or, if they are many, at a huge page where the system gives them."""
    align = _HUGE_PAGE if num_bytes >= _HUGE_PAGE // 2 else 64
    storage = torch.empty(num_bytes + align, dtype=torch.uint8)
    begin = -storage.data_ptr() % align
    aligned = storage[begin : begin + num_bytes]
    functions().hearth_advise_huge(aligned.data_ptr(), num_bytes)
    return aligned


def _rows(weight_NK: torch.Tensor) -> torch.Tensor:
    assert weight_NK.dtype is torch.bfloat16
    weight_NK = weight_NK.detach()
    return weight_NK if weight_NK.stride(1) == 1 else weight_NK.contiguous()


def _bias(bias_N: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias_N is None else bias_N.detach().float().contiguous()


def _pad_scale(scale_N: torch.Tensor) -> torch.Tensor:
    return F.pad(scale_N, (0, -len(scale_N) % 32)).contiguous()
