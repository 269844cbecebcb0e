"""Which precision is used, what is refused, and float16 training with loss scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hearth.errors import ConfigError
from hearth.training.clipping import total_norm
from hearth.training.precision import autocast, choose_precision
from hearth.training.scaler import LossScaler

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_what_is_asked_for_is_taken(name: str) -> None:
    assert choose_precision(name, CPU) == name


def test_auto_is_bf16_or_fp32_but_never_less() -> None:
    assert choose_precision("auto", CPU) in ("bf16", "fp32")


def test_unknown_names_the_known() -> None:
    with pytest.raises(ConfigError, match="'fp4' is unknown") as caught:
        choose_precision("fp4", CPU)
    assert "auto, fp32, bf16, fp16, fp8" in str(caught.value)


def test_fp8_on_a_cpu_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"fp8.*cpu has no float8.*8\.9"):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp8", torch.bfloat16)]
)
def test_autocast_types(name: str, dtype: torch.dtype) -> None:
    weight = torch.ones(4, 4)
    with autocast(name, CPU):
        assert (weight @ weight).dtype == dtype
    with autocast("fp32", CPU):
        assert (weight @ weight).dtype == torch.float32


def test_scale_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scaler = LossScaler(start=8.0, growth_every=3)
    factors = []
    for overflowed in (True, False, False, False, True, False, True, True, True):
        scaler.update(overflowed=overflowed)
        factors.append(scaler.factor)
    assert factors == [4.0, 4.0, 4.0, 8.0, 4.0, 4.0, 2.0, 1.0, 1.0]
    assert not scaler.may_skip()


def test_scaler_has_the_trajectory_of_torch() -> None:
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    ours = LossScaler(start=2.0**10, growth_every=4)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        overflow = bool(torch.rand((), generator=generator) < 0.15)
        optimizer.zero_grad()
        theirs.scale((weight * (math.inf if overflow else 1.0)).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflowed=overflow)
        assert ours.factor == theirs.get_scale()


def test_scaler_state_continues() -> None:
    scaler = LossScaler(start=8.0, growth_every=3)
    for overflowed in (True, False, False):
        scaler.update(overflowed=overflowed)
    other = LossScaler(growth_every=3)
    other.load_state_tensors(scaler.state_tensors())
    for each in (scaler, other):
        each.update(overflowed=False)
    assert (other.factor, other.num_good_steps) == (scaler.factor, scaler.num_good_steps) == (8.0, 0)


def small_gradient(factor: float) -> torch.Tensor:
    """Through a float16 product whose incoming gradient is 1e-8, below the smallest float16."""
    weight = torch.nn.Parameter(torch.ones(8, 8))
    with autocast("fp16", CPU):
        out = torch.nn.functional.linear(torch.ones(1, 8), weight)
        loss = (out.float() * 1e-8).sum()
    (loss * factor).backward()
    assert weight.grad is not None
    return weight.grad


def test_gradients_that_would_vanish_are_kept() -> None:
    assert total_norm([small_gradient(1.0)]) == 0.0
    scaler = LossScaler()
    gradient = small_gradient(scaler.factor)
    scaler.unscale([gradient])
    torch.testing.assert_close(gradient, torch.full((8, 8), 1e-8), rtol=1e-3, atol=0)


def test_an_overflow_is_seen_and_the_next_factors_pass(tiny_model: Any) -> None:
    """A model in float16 autocast with a factor that is far too large comes down to one that works."""
    scaler = LossScaler(start=2.0**40)
    ids = torch.arange(16)[None]
    found = []
    for _ in range(40):
        tiny_model.zero_grad()
        with autocast("fp16", CPU):
            loss = tiny_model(input_ids=ids, labels=ids).loss
        (loss * scaler.factor).backward()
        gradients = [weight.grad for weight in tiny_model.parameters() if weight.grad is not None]
        scaler.unscale(gradients)
        finite = math.isfinite(float(total_norm(gradients)))
        scaler.update(overflowed=not finite)
        found.append(finite)
        if finite:
            break
    assert found.index(True) >= 5
    exact = tiny_model(input_ids=ids, labels=ids).loss
    reference = torch.autograd.grad(exact, list(tiny_model.parameters()))
    assert float(total_norm(gradients)) == pytest.approx(float(total_norm(reference)), rel=0.02)
