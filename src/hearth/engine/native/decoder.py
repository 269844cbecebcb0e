"""The structures of decoder.h, member for member, and its functions."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from hearth.engine.attention.native_path import Args
from hearth.engine.native.build import library

NORM_RMS, NORM_RMS_WIDE, NORM_LAYER = 1, 2, 3

_P, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Norm(ctypes.Structure):
    _fields_ = (("weight", _P), ("bias", _P), ("eps", ctypes.c_float), ("kind", _I32))


class Linear(ctypes.Structure):
    _fields_ = (
        ("weight", _P), ("scale", _P), ("bias", _P), ("N", _I64), ("K", _I64), ("kind", _I32), ("group", _I32)
    )  # fmt: skip


class DecoderLayer(ctypes.Structure):
    _fields_ = (
        *((name, Norm) for name in ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")),
        *((name, Norm) for name in ("query_norm", "key_norm")),
        *((name, _I32) for name in ("norm_all_heads", "activation")),
        *((name, Linear) for name in ("query", "key", "value", "out", "gate", "up", "down")),
        *((name, _I32) for name in ("gated", "rotary_dim")),
        ("cos", _P), ("sin", _P),
        ("attention", Args),
    )  # fmt: skip


class DecoderStep(ctypes.Structure):
    _fields_ = (
        ("num_tokens", _I64), ("hidden_size", _I64), ("positions", _P), ("hidden", _P), ("attention", Args)
    )  # fmt: skip


@functools.cache
def functions() -> Any:
    """The library's functions with their argument types; call it only where `library` returns one."""
    native = library()
    assert native is not None, "no compiled kernels"
    lib = native.functions
    sizes = (_I64 * 4)()
    lib.hearth_decoder_sizes(sizes)
    ours = [ctypes.sizeof(structure) for structure in (Norm, Linear, DecoderLayer, DecoderStep)]
    assert list(sizes) == ours, "decoder.h and its copy here differ"
    lib.hearth_decoder_workspace_bytes.argtypes = [_P, _I64, _P]
    lib.hearth_decoder_workspace_bytes.restype = _I64
    lib.hearth_decode.argtypes = [_P, _I64, _P, _P, _P, _I32]
    return lib
