"""The average of the weights."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from hearth.errors import IntegrityError
from hearth.training.ema import WeightAverage


def jump(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))


def averages(average: WeightAverage) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in average.state_tensors().items()}


def test_by_its_formula_in_float64() -> None:
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.5)
    expected = model.weight.detach().double()
    for step in range(1, 20):
        jump(model, step)
        average.update()
        decay = min(0.5, step / (step + 9))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(averages(average)["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_is_torchs_average_once_the_decay_is_reached() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = nn.Linear(3, 2)
    ours = WeightAverage(model, 0.9)
    for step in range(81):  # 81 / 90 = 0.9
        jump(model, step)
        ours.update()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # takes a copy
    with torch.no_grad():
        for name, weight in theirs.module.named_parameters():
            weight.copy_(averages(ours)[name])
    for step in range(100, 110):
        jump(model, step)
        ours.update()
        theirs.update_parameters(model)
    for name, weight in theirs.module.named_parameters():
        torch.testing.assert_close(averages(ours)[name], weight)


def test_applied_within_and_the_weights_afterwards_bit_for_bit() -> None:
    model = nn.Linear(3, 2).bfloat16()
    average = WeightAverage(model, 0.9)
    jump(model, 1)
    average.update()
    before = model.weight.detach().clone()
    within = []
    with contextlib.suppress(RuntimeError), average.applied():
        within.append(model.weight.detach().clone())
        raise RuntimeError("an evaluation that fails")
    assert torch.equal(within[0], averages(average)["weight"].bfloat16())
    assert not torch.equal(within[0], before)
    assert torch.equal(model.weight, before)
    assert averages(average)["weight"].dtype == torch.float32


def test_resumes_exactly() -> None:
    model = nn.Linear(3, 2)
    straight = WeightAverage(model, 0.8)
    for step in range(4):
        jump(model, step)
        straight.update()
    resumed = WeightAverage(model, 0.8)
    resumed.load_state_tensors(averages(straight))
    for each in (straight, resumed):
        jump(model, 9)
        each.update()
    for name, value in averages(straight).items():
        assert torch.equal(averages(resumed)[name], value)


def test_frozen_weights_are_not_averaged(tiny_model: Any) -> None:
    for name, weight in tiny_model.named_parameters():
        weight.requires_grad_("layers.0." in name)
    names = set(averages(WeightAverage(tiny_model, 0.9))) - {"|num_updates"}
    assert names
    assert all("layers.0." in name for name in names)


def test_an_average_of_other_weights_is_refused() -> None:
    with pytest.raises(IntegrityError, match="other weights"):
        WeightAverage(nn.Linear(3, 2), 0.9).load_state_tensors({"|num_updates": torch.tensor(1)})
