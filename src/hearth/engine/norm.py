"""RMS normalisation in one pass instead of eight, where a model's own layer is proved to mean the same.

Legend: T tokens (or tokens x heads), D features.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

# Elements below which waking another thread costs more than it saves.
_WORTH_A_THREAD = 1 << 17


class FusedRMSNorm(nn.Module):
    """Takes the place of a model's RMSNorm on a CPU."""

    def __init__(self, original: nn.Module, weight_D: torch.Tensor, eps: float) -> None:
        super().__init__()
        from hearth.engine.attention.numba_path import view

        self.original = original
        self.weight = weight_D
        self.eps = eps
        self._weight_np = view(weight_D.detach())
        self._dtype = weight_D.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype is not self._dtype:
            result: torch.Tensor = self.original(x)
            return result
        from hearth.engine.attention.numba_kernels import rms_norm_bf16, rms_norm_f32
        from hearth.engine.attention.numba_path import run_parts, view

        x = x.contiguous()
        out = torch.empty_like(x)
        kernel = rms_norm_bf16 if x.dtype is torch.bfloat16 else rms_norm_f32
        x_TD, out_TD = view(x).reshape(-1, x.shape[-1]), view(out).reshape(-1, x.shape[-1])

        def run(begin: int, end: int) -> None:
            kernel(x_TD[begin:end], self._weight_np, self.eps, out_TD[begin:end])

        num_parts = max(1, min(torch.get_num_threads(), x.numel() // _WORTH_A_THREAD))
        cuts = [len(x_TD) * i // num_parts for i in range(num_parts + 1)]
        run_parts(run, list(itertools.pairwise(cuts)))
        return out


@torch.inference_mode()
def fuse_norms(model: nn.Module) -> int:
    """Replace every RMSNorm that the fused kernel reproduces on random input; return how many."""
    num_fused = 0
    for module in list(model.modules()):
        if isinstance(module, FusedRMSNorm):
            continue
        for name, child in list(module.named_children()):
            fused = _fused(child)
            if fused is not None:
                setattr(module, name, fused)
                num_fused += 1
    return num_fused


def _fused(child: nn.Module) -> FusedRMSNorm | None:
    if not type(child).__name__.endswith("RMSNorm"):
        return None
    weight: Any = getattr(child, "weight", None)
    eps: Any = getattr(child, "variance_epsilon", getattr(child, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.device.type != "cpu":
        return None
    x_TD = torch.randn(5, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.dtype) * 3
    fused = FusedRMSNorm(child, weight, eps)
    try:
        expected, got = child(x_TD), fused(x_TD)
    except (TypeError, RuntimeError):
        return None  # it takes more arguments than the input
    # Other rounding of the mean may move a bfloat16 by one unit in its last place.
    tolerance = 1e-5 if weight.dtype is torch.float32 else 1e-2
    same = expected.dtype == got.dtype and torch.allclose(expected, got, rtol=tolerance, atol=tolerance)
    return fused if same else None
