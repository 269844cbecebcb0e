"""8-bit moments: the codes, closeness to AdamW, and memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hearth.training.optimizers.blockwise import BLOCK, code_book, dequantize, quantize

Make = Callable[..., Any]


@pytest.mark.parametrize("signed", [True, False])
def test_code_book_of_the_paper(signed: bool) -> None:
    codes = code_book(signed)
    assert len(codes) == 256
    assert list(codes) == sorted(set(codes))
    assert codes[-1] == 1.0
    assert 0.0 in codes
    assert min(abs(code) for code in codes if code) == pytest.approx(5.5e-7 if signed else 3.25e-7)
    assert codes[0] == (pytest.approx(-0.99297, abs=1e-5) if signed else 0.0)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_survives(signed: bool) -> None:
    values = torch.tensor(code_book(signed)) * 3.0
    codes, scale = quantize(values, signed=signed)
    assert codes.tolist() == list(range(256))
    assert torch.equal(dequantize(codes, scale, signed=signed), values)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 3 * BLOCK + 5), signed=st.booleans())
def test_error_is_half_a_gap_of_the_code_book(seed: int, size: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator) * 10 ** torch.randn(size, generator=generator)
    values = values if signed else values.abs()
    codes, scale = quantize(values, signed=signed)
    got = dequantize(codes, scale, signed=signed)
    assert codes.dtype == torch.uint8
    assert scale.numel() == -(-size // BLOCK)
    book = code_book(signed)
    gap = max(high - low for low, high in itertools.pairwise(book))
    for start in range(0, size, BLOCK):
        part = slice(start, start + BLOCK)
        assert (got[part] - values[part]).abs().max() <= gap / 2 * scale[start // BLOCK] * 1.001 + 1e-9


def test_zero_stays_zero_and_a_small_divisor_never_becomes_zero() -> None:
    values = torch.tensor([0.0, 1e-12, 1.0])
    codes, scale = quantize(values, signed=False)
    got = dequantize(codes, scale, signed=False)
    assert got[0] == 0
    assert got[1] > 0
    assert got[2] == 1


def test_trajectory_stays_close_to_adamw(make_net: Make, make_optimizer: Make, train_net: Make) -> None:
    exact, packed = make_net(64), make_net(64)
    reference = train_net(exact, make_optimizer(exact, learning_rate=3e-3), 60)
    losses = train_net(packed, make_optimizer(packed, optimizer="adamw8bit", learning_rate=3e-3), 60)
    assert reference[-1] < 0.05
    assert losses[:5] == pytest.approx(reference[:5], rel=0.02)
    assert losses[-1] == pytest.approx(reference[-1], abs=0.01)


def test_a_small_gradient_beside_a_large_one_does_not_explode(make_optimizer: Make) -> None:
    """With the second moment itself in 8 bits, 1e-4 beside 1 becomes 0, and the update m / eps."""
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = make_optimizer(module, optimizer="adamw8bit", learning_rate=1.0, weight_decay=0.0)
    scale = torch.ones(64, 128)
    scale[:, 1::2] = 1e-4
    for step in range(10):
        module.w.grad = scale * torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
        before = module.w.detach().clone()
        optimizer.step()
        assert (module.w.detach() - before).abs().max() < 10.0


def test_memory_is_a_quarter_of_adamws(make_optimizer: Make) -> None:
    def state_bytes(name: str) -> int:
        module = torch.nn.Module()
        module.w = torch.nn.Parameter(torch.zeros(512, 512))
        module.w.grad = torch.ones(512, 512)
        optimizer = make_optimizer(module, optimizer=name)
        optimizer.step()
        values = optimizer.state[module.w].values()
        return sum(value.numel() * value.element_size() for value in values)

    assert state_bytes("adamw8bit") / state_bytes("adamw") == pytest.approx(0.254, abs=0.002)
    assert state_bytes("adafactor") / state_bytes("adamw") < 0.01
    assert state_bytes("lion") / state_bytes("adamw") == pytest.approx(0.5, abs=0.01)
