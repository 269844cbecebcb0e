"""Which way of computing attention suits a layer on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hearth.engine.attention import triton_path
from hearth.errors import ConfigError

if TYPE_CHECKING:
    from hearth.engine.attention.layer import LayerSpec


def choose_path(
    spec: LayerSpec,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
    *,
    wanted: str = "auto",
    native: bool = True,
) -> str:
    """ "triton", "native", "numba" or "torch": the quickest that can compute this layer, or the wanted one.

    native: whether "auto" may choose the compiled kernels. Raises `ConfigError` if ``wanted`` cannot do it.
    """
    if wanted != "auto":
        tried = [wanted]
    elif device.type != "cpu":
        tried = ["triton"]
    else:
        tried = ["native", "numba"] if native else ["numba"]
    reason = ""
    for path in tried:
        if path == "native":
            reason = _not_native(spec, dtype, device, block_size)
        elif path == "numba":
            reason = why_not_numba(dtype, device)
        elif path == "triton":
            reason = triton_path.unsuited(dtype, device)
        if not reason:
            return path
    if wanted == "auto":
        return "torch"
    raise ConfigError(f"attention is {wanted!r}, which cannot run here: {reason}", fix="use attention auto")


def _not_native(spec: LayerSpec, dtype: torch.dtype, device: torch.device, block_size: int) -> str:
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return f"it computes bfloat16 on the CPU, not {dtype} on {device}"
    from hearth.engine.attention.native_path import unsuited
    from hearth.engine.native import library, why_not

    return unsuited(spec, block_size) or ("" if library() else why_not())


def why_not_numba(dtype: torch.dtype, device: torch.device) -> str:
    """Why the numba kernels cannot run here; empty if they can."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return f"it computes float32 and bfloat16 on the CPU, not {dtype} on {device}"
    try:
        import numba  # noqa: F401
    except ImportError:
        return "numba is not installed"
    return ""
