"""Linear layers by the compiled kernels: packing, and the product. Layouts are described in gemm.h.

Legend: M rows of input, N outputs, K inputs of the layer.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from hearth.engine.native.build import library

BF16, INT8, INT4 = 0, 1, 2
_ACCUMULATE, _OUT_F32 = 1, 2
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
    lib.hearth_gemm.argtypes = [
        _I, _I, _I, _I, _P, _I64, _P, _P, _P, _P, _I64, _I64, _I64, _I64
    ]  # fmt: skip
    return lib


def allocate(kind: int, num_outputs: int, num_inputs: int, group: int = 64) -> torch.Tensor:
    """Memory for packed weights: bytes, aligned to 2 MiB, on huge pages where the system gives them."""
    lib = functions()
    num_bytes = lib.hearth_packed_bytes(kind, num_outputs, num_inputs, group)
    align = 1 << 21 if num_bytes >= 1 << 20 else 64
    storage = torch.empty(num_bytes + align, dtype=torch.uint8)
    packed = storage[-storage.data_ptr() % align :][:num_bytes]
    lib.hearth_advise_huge(packed.data_ptr(), num_bytes)
    return packed


def pack_bf16(weight_NK: torch.Tensor) -> torch.Tensor:
    """The packed form of a bfloat16 weight; rows may be apart, elements of a row not."""
    if weight_NK.stride(1) != 1:
        weight_NK = weight_NK.contiguous()
    N, K = weight_NK.shape
    packed = allocate(BF16, N, K)
    functions().hearth_pack_bf16(
        weight_NK.data_ptr(), weight_NK.stride(0), N, K, packed.data_ptr(), torch.get_num_threads()
    )
    return packed


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    num_outputs: int,
    *,
    kind: int = BF16,
    group: int = 64,
    scale_N: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x [..., K] bfloat16 times packed weights, plus float32 ``bias_N``: [..., N] of ``out_dtype``.

    ``out`` [M, N] may have rows apart; with ``accumulate`` the product is added to it. ``scale_N`` is the
    padded scale of quantised weights.
    """
    K = x.shape[-1]
    x_MK = x.reshape(-1, K)
    if x_MK.stride(-1) != 1:
        x_MK = x_MK.contiguous()
    M = x_MK.shape[0]
    if out is None:
        out = torch.empty(M, num_outputs, dtype=out_dtype)
        result = out.view(*x.shape[:-1], num_outputs)
    else:
        result = out
    assert x.dtype is torch.bfloat16
    assert out.shape == (M, num_outputs)
    assert out.stride(1) == 1
    flags = (_ACCUMULATE if accumulate else 0) | (_OUT_F32 if out.dtype is torch.float32 else 0)
    functions().hearth_gemm(
        kind,
        group,
        flags,
        torch.get_num_threads(),
        x_MK.data_ptr(),
        x_MK.stride(0),
        packed.data_ptr(),
        None if scale_N is None else scale_N.data_ptr(),
        None if bias_N is None else bias_N.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        M,
        num_outputs,
        K,
    )
    return result
