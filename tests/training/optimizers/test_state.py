"""Optimizer state by name: another order of weights, an exact continuation, and refusals."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hearth.errors import ConfigError, IntegrityError
from hearth.training.optimizers import load_optimizer_tensors, optimizer_tensors
from hearth.training.optimizers.build import OPTIMIZERS

Make = Callable[..., Any]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_continues_bitwise_with_another_order_of_weights(
    name: str, make_net: Make, make_optimizer: Make, train_net: Make
) -> None:
    width = 64  # above the size from which adamw8bit packs
    straight = make_net(width)
    optimizer = make_optimizer(straight, optimizer=name)
    train_net(straight, optimizer, 3)
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, straight).items()}
    weights = {key: value.clone() for key, value in straight.state_dict().items()}
    train_net(straight, optimizer, 3, first=3)

    resumed = make_net(width, seed=1)
    resumed.load_state_dict(weights)
    resumed._modules = OrderedDict(reversed(resumed._modules.items()))
    other = make_optimizer(resumed, optimizer=name)
    assert next(iter(resumed.named_parameters()))[0] != next(iter(straight.named_parameters()))[0]
    load_optimizer_tensors(other, resumed, saved)
    train_net(resumed, other, 3, first=3)
    for key, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    again = optimizer_tensors(other, resumed)
    for key, value in optimizer_tensors(optimizer, straight).items():
        assert torch.equal(again[key], value), key


def test_a_weight_without_a_gradient_has_no_state(
    make_net: Make, make_optimizer: Make, train_net: Make
) -> None:
    model = make_net()
    model.unused = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model)
    train_net(model, optimizer, 1)
    saved = optimizer_tensors(optimizer, model)
    assert not [key for key in saved if key.startswith("unused")]
    other = make_optimizer(model)
    load_optimizer_tensors(other, model, saved)
    assert set(optimizer_tensors(other, model)) == set(saved)


def test_state_of_other_weights_is_refused(make_net: Make, make_optimizer: Make, train_net: Make) -> None:
    model = make_net()
    with pytest.raises(IntegrityError, match=r"other\.weight does not train here"):
        load_optimizer_tensors(make_optimizer(model), model, {"other.weight|exp_avg": torch.zeros(1)})


@pytest.mark.parametrize(("saved", "loaded"), [("adamw", "lion"), ("lion", "adamw"), ("adamw8bit", "adamw")])
def test_state_of_another_optimizer_is_refused(
    saved: str, loaded: str, make_net: Make, make_optimizer: Make, train_net: Make
) -> None:
    model = make_net()
    optimizer = make_optimizer(model, optimizer=saved)
    train_net(model, optimizer, 1)
    with pytest.raises(ConfigError, match=r"another optimizer"):
        load_optimizer_tensors(
            make_optimizer(model, optimizer=loaded), model, optimizer_tensors(optimizer, model)
        )
