"""float8 products, beside float64. torch computes them on the CPU too, slowly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hearth.errors import ConfigError
from hearth.training.float8 import Float8Linear, to_float8, use_float8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_largest_value_fills_the_range(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(64, 64) * 1e-5
    packed, scale = to_float8(values, dtype)
    assert packed.float().abs().max() == torch.finfo(dtype).max
    # Half of the last place: 3 bits of fraction in e4m3, 2 in e5m2.
    places = 2.0**-4 if dtype == torch.float8_e4m3fn else 2.0**-3
    error = (packed.float() * scale - values).abs()
    smallest = torch.finfo(dtype).smallest_normal * scale
    assert (error <= values.abs().clamp(min=smallest) * places * 1.001).all()


def test_zeros_stay_zeros() -> None:
    packed, scale = to_float8(torch.zeros(4, 4), torch.float8_e4m3fn)
    assert torch.equal(packed.float() * scale, torch.zeros(4, 4))


@pytest.mark.parametrize("num_rows", [32, 21])  # 21 is padded
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradients_near_float64(num_rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=bias)
    exact = nn.Linear(48, 32, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    layer.__class__ = Float8Linear
    x = torch.randn(num_rows, 48, requires_grad=True)
    y = x.detach().double().requires_grad_()
    incoming = torch.randn(num_rows, 32)
    out, expected = layer(x[None])[0], exact(y)
    assert out.dtype == torch.bfloat16
    out.backward(incoming.bfloat16())
    expected.backward(incoming.double())
    pairs = [(out, expected), (x.grad, y.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), exact.parameters(), strict=True)]
    for ours, reference in pairs:
        assert ours is not None
        assert reference is not None
        assert ours.shape == reference.shape
        # Rounding is within 1/16 for values and 1/8 for gradients, about 0.6 of that on average.
        relative = (ours.double() - reference).norm() / reference.norm()
        assert relative < 0.08


def test_products_are_those_of_the_rounded_factors() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=False)
    x = torch.randn(16, 48, requires_grad=True)
    incoming = torch.randn(16, 32).bfloat16()

    def rounded(values: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
        packed, scale = to_float8(values.detach(), dtype)
        return packed.double() * scale.double()

    weight8, x8, incoming8 = rounded(layer.weight), rounded(x), rounded(incoming, torch.float8_e5m2)
    layer.__class__ = Float8Linear
    out = layer(x)
    out.backward(incoming)
    assert x.grad is not None
    assert layer.weight.grad is not None
    for ours, expected in [
        (out, x8 @ weight8.T),
        (x.grad, incoming8 @ weight8),
        (layer.weight.grad, incoming8.T @ x8),
    ]:
        torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=1e-3)


def test_use_float8_converts_the_layers_alone(tiny_model: Any) -> None:
    names = set(tiny_model.state_dict())
    count = use_float8(tiny_model)
    converted = [name for name, module in tiny_model.named_modules() if isinstance(module, Float8Linear)]
    assert len(converted) == count == 7 * len(tiny_model.model.layers)
    assert all(".layers." in name for name in converted)
    assert set(tiny_model.state_dict()) == names


def test_training_in_float8_follows_bfloat16(tiny_model: Any) -> None:
    import copy

    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))

    def train(model: Any) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    reference = train(copy.deepcopy(tiny_model))
    use_float8(tiny_model)
    losses = train(tiny_model)
    assert reference[-1] < reference[0] - 1.0
    assert losses == pytest.approx(reference, rel=0.1)
    assert losses != reference


def test_routers_and_odd_sizes_stay() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=32,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=16,
    )
    model = AutoModelForCausalLM.from_config(config)
    use_float8(model)
    converted = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    assert converted
    assert all("self_attn" in name for name in converted)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp8"):
        use_float8(nn.Sequential(nn.Linear(16, 16)))
