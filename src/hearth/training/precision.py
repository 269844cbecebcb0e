"""Which device and which arithmetic a training step uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from hearth.errors import ConfigError


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; else the GPU when there is one, else the CPU."""
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cpu_feature(name: str) -> bool:
    # These probes are private in torch and have changed names; absence means "cannot tell", hence fp32.
    probe: Callable[[], bool] | None = getattr(torch.cpu, name, None)
    return bool(probe and probe())


def has_fast_bf16(device: str | torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices, rather than converting them first."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _cpu_feature("_is_avx512_bf16_supported") or _cpu_feature("_is_amx_tile_supported")


def choose_precision(requested: str, device: str | torch.device) -> str:
    """``"bf16"`` or ``"fp32"`` for ``train.precision`` on ``device``; "auto" asks the hardware."""
    if requested == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if requested not in ("bf16", "fp32"):
        raise ConfigError(f"train.precision {requested!r} is unknown", fix="use auto, bf16 or fp32")
    return requested


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16: weights stay float32, products are computed in bfloat16. fp32: everything in the model's type."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
