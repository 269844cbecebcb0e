"""Packed linear layers in a model, in every form, against the layer that they replace."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hearth.engine import linear, native
from hearth.engine.linear import OneDnn, PackedLinear, TorchInt4, TorchInt8, can_pack, pack_linears
from hearth.engine.native.gemm import BF16, INT4, INT8, NativeWeight

has_native = native.library() is not None
ERROR = {"auto": 0.004, "int8": 0.01, "int4": 0.13}  # of a product with random weights, relative


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_native", [False, True])
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(48, 128), (50, 70)])
def test_the_layer_computes_what_it_replaces(
    weights: str, use_native: bool, dtype: torch.dtype, num_outputs: int, num_inputs: int
) -> None:
    weight_NK = random(num_outputs, num_inputs, dtype=dtype)
    bias_N = random(num_outputs, dtype=dtype, seed=1)
    for bias in (None, bias_N):
        packed = PackedLinear(weight_NK, bias, weights=weights, use_native=use_native)
        for shape in ((1, num_inputs), (2, 3, num_inputs), (40, num_inputs)):
            x = random(*shape, dtype=dtype, seed=2)
            out = packed(x)
            assert out.dtype is dtype
            expected = nn.functional.linear(
                x.double(), weight_NK.double(), None if bias is None else bias.double()
            )
            assert out.shape == expected.shape
            assert relative_error(out, expected) < ERROR[weights]


def test_the_product_is_chosen_by_what_there_is() -> None:
    def product(dtype: torch.dtype, weights: str, use_native: bool = True) -> Any:
        return PackedLinear(random(32, 64, dtype=dtype), None, weights=weights, use_native=use_native).product

    if has_native:
        for weights, kind in (("auto", BF16), ("int8", INT8), ("int4", INT4)):
            chosen = product(torch.bfloat16, weights)
            assert isinstance(chosen, NativeWeight)
            assert chosen.kind == kind
    for weights, form in (("auto", OneDnn), ("int8", TorchInt8), ("int4", TorchInt4)):
        assert isinstance(product(torch.float32, weights), form)
        assert isinstance(product(torch.bfloat16, weights, use_native=False), form)


def test_quantised_products_agree_on_every_path() -> None:
    """The codes are the same everywhere; only rounding differs."""
    weight_NK, x = random(64, 256, dtype=torch.bfloat16), random(5, 256, dtype=torch.bfloat16, seed=1)
    for weights in ("int8", "int4"):
        ours, torchs = (
            PackedLinear(weight_NK, None, weights=weights, use_native=use_native)(x)
            for use_native in (True, False)
        )
        assert relative_error(ours, torchs) < 0.01


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 64, bias=False))
        self.old = Conv1D(32, 64)
        self.head = nn.Linear(64, 80, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_every_plain_linear_of_a_model_is_replaced(weights: str) -> None:
    model = Model().bfloat16()
    x = random(3, 64, dtype=torch.bfloat16)
    expected = model.old(x).detach()
    assert pack_linears(model, weights=weights) == 4
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert sorted(packed) == ["body.0", "body.2", "head", "old"]
    assert relative_error(model.old(x), expected) < ERROR[weights]
    if has_native and weights == "int4":
        assert packed["body.0"].native is not None
        assert packed["body.0"].native.kind == INT4
        assert packed["head"].native is not None
        assert packed["head"].native.kind == INT8


def test_the_original_weight_is_gone_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))).bfloat16()
    originals = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    choose = linear._choose_product

    def watch(*args: Any) -> Any:
        alive.append(  # what is being packed, and those after it
            sum(reference() is not None for reference in originals)
        )
        return choose(*args)

    monkeypatch.setattr(linear, "_choose_product", watch)
    pack_linears(model)
    assert alive == [4, 3, 2, 1]
    assert all(reference() is None for reference in originals)


def test_the_weight_shows_its_shape_and_refuses_to_compute() -> None:
    packed = PackedLinear(random(32, 64, dtype=torch.bfloat16), None)
    assert packed.weight.shape == (32, 64)
    assert packed.weight.dtype is torch.bfloat16
    assert packed.weight.device.type == "meta"
    assert "in_features=64, out_features=32" in repr(packed)


def test_what_can_be_packed() -> None:
    cpu = torch.device("cpu")
    assert can_pack(torch.float32, cpu)
    assert not can_pack(torch.float32, torch.device("cuda"))
    assert not can_pack(torch.float16, cpu)
