"""Which device and which arithmetic a training step uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from hearth.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for; else the GPU when there is one, else the CPU.

    A GPU that is asked for by number becomes the current one: its random state is the one that is saved.
    """
    if device is not None:
        chosen = torch.device(device)
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)
        return chosen
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
    """What ``train.precision`` means on ``device``: fp32, bf16, fp16 or fp8; "auto" asks the hardware.

    Raises ConfigError for a precision that the device does not have.
    """
    if requested == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if requested not in PRECISIONS:
        raise ConfigError(
            f"train.precision {requested!r} is unknown", fix=f"use one of auto, {', '.join(PRECISIONS)}"
        )
    if requested == "fp8":
        reason = why_no_fp8(torch.device(device))
        if reason is not None:
            raise ConfigError(f"train.precision fp8: {reason}", fix="use precision: bf16")
    return requested


def why_no_fp8(device: torch.device) -> str | None:
    """None when the hardware multiplies float8 matrices, else the reason."""
    if device.type != "cuda":
        return f"a {device.type} has no float8 arithmetic; it takes a GPU of compute capability 8.9 or more"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; it takes 8.9"
    return None


def compute_dtype(precision: str) -> torch.dtype | None:
    """The type in which autocast multiplies; None where it is the model's own, or changes within a layer."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16, fp16: weights stay float32, products are computed in that type. fp32: all in the model's type.

    fp8: as bf16; the linear layers that were converted multiply in float8 (``hearth.training.float8``).
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.float16 if precision == "fp16" else torch.bfloat16)
