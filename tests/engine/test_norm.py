"""Fused normalisation: equal to transformers' own, and left alone where it is something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from hearth.engine.norm import FusedRMSNorm, fuse_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (1, 7, 64), (1, 3, 4, 64), (1, 0, 64), (4096, 64)])
def test_equal_to_the_original(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    norm = Qwen3RMSNorm(64).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    model = torch.nn.Sequential(norm)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) * 5
    expected = norm(x)
    assert fuse_norms(model) == 1
    assert isinstance(model[0], FusedRMSNorm)
    got = model[0](x)
    if dtype is torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    else:  # one unit in the last place, rarely
        assert float((got != expected).float().mean() if got.numel() else 0.0) < 0.02
        torch.testing.assert_close(got, expected, rtol=8e-3, atol=1e-6)


def test_strided_input(family_model: Any) -> None:
    norm = Qwen3RMSNorm(8)
    model = torch.nn.Sequential(norm)
    fuse_norms(model)
    x = torch.randn(1, 6, 4, 8).transpose(1, 2)
    torch.testing.assert_close(model[0](x), norm(x))


def test_another_rule_of_the_same_name_is_left_alone() -> None:
    """Gemma multiplies by 1 + weight."""
    model = torch.nn.Sequential(Gemma2RMSNorm(16))
    assert fuse_norms(model) == 0
    assert isinstance(model[0], Gemma2RMSNorm)
