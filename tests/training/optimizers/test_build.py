"""Every optimizer against a reference: torch's, transformers', or the published formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hearth.config.recipe import TrainSection
from hearth.errors import ConfigError
from hearth.training.optimizers import build_optimizer, set_learning_rate
from hearth.training.optimizers.build import OPTIMIZERS

Make = Callable[..., Any]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same_weights(ours: nn.Module, reference: nn.Module, **tolerance: float) -> None:
    for (name, weight), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def decay_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [w for w in model.parameters() if w.ndim >= 2], "weight_decay": decay},
        {"params": [w for w in model.parameters() if w.ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learns(name: str, make_net: Make, make_optimizer: Make, train_net: Make) -> None:
    model = make_net()
    rate = {"adafactor": 0.1, "lion": 3e-3}.get(name, 1e-2)
    losses = train_net(model, make_optimizer(model, optimizer=name, learning_rate=rate), 60)
    assert losses[0] > 2.0
    assert losses[-1] < 0.1


def test_adamw_is_torchs(make_net: Make, make_optimizer: Make, train_net: Make) -> None:
    ours, reference = make_net(), make_net()
    optimizer = torch.optim.AdamW(decay_groups(reference, 0.2), lr=1e-2, betas=(0.8, 0.9), eps=1e-6)
    keys = {"learning_rate": 1e-2, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-6}
    assert train_net(ours, make_optimizer(ours, **keys), 10) == pytest.approx(
        train_net(reference, optimizer, 10), rel=1e-5
    )
    assert_same_weights(ours, reference, rtol=1e-4, atol=1e-6)


def test_adafactor_agrees_with_transformers(make_net: Make, make_optimizer: Make, train_net: Make) -> None:
    from transformers.optimization import Adafactor

    ours, reference = make_net(), make_net()
    # torch's takes min(rate, 1 / √t), transformers' the rate itself: equal for small rates.
    optimizer = Adafactor(
        decay_groups(reference, 0.1), lr=0.02, scale_parameter=True, relative_step=False, warmup_init=False
    )
    keys = {"optimizer": "adafactor", "learning_rate": 0.02, "weight_decay": 0.0}
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    train_net(ours, make_optimizer(ours, **keys), 10)
    train_net(reference, optimizer, 10)
    assert_same_weights(ours, reference, rtol=1e-4, atol=1e-5)


def test_lion_by_its_formula_in_float64(make_net: Make, make_optimizer: Make, train_net: Make) -> None:
    model = make_net().double()
    optimizer = make_optimizer(
        model, optimizer="lion", learning_rate=1e-3, weight_decay=0.3, beta1=0.9, beta2=0.99
    )
    moments = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for step in range(8):
        before = weights_of(model)
        train_net(model, optimizer, 1, first=step)
        for name, weight in model.named_parameters():
            decay = 0.3 if weight.ndim >= 2 else 0.0
            direction = torch.sign(0.9 * moments[name] + 0.1 * weight.grad)
            expected = before[name] - 1e-3 * (direction + decay * before[name])
            moments[name] = 0.99 * moments[name] + 0.01 * weight.grad
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-15)


def test_muon_is_torchs_muon_and_adamw(make_net: Make, make_optimizer: Make, train_net: Make) -> None:
    ours, reference = make_net(), make_net()
    hidden = [reference.hidden.weight, reference.down.weight]
    others = [w for w in reference.parameters() if all(w is not matrix for matrix in hidden)]
    muon = torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [w for w in others if w.ndim >= 2], "weight_decay": 0.1},
            {"params": [w for w in others if w.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    mine = make_optimizer(ours, optimizer="muon", learning_rate=1e-2)
    for step in range(6):
        set_learning_rate(mine, 1e-2 / (step + 1))
        for group in [*muon.param_groups, *adamw.param_groups]:
            group["lr"] = 1e-2 / (step + 1)
        train_net(ours, mine, 1, first=step)
        muon.zero_grad()
        train_net(reference, adamw, 1, first=step)
        muon.step()
    assert_same_weights(ours, reference, rtol=1e-4, atol=1e-6)


def test_rates_follow_the_schedule_times_the_factor_of_the_group(
    make_net: Make, make_optimizer: Make
) -> None:
    model = make_net()
    optimizer = make_optimizer(
        model, parameter_groups=[{"match": "lm_head.*", "learning_rate_scale": 0.25}], learning_rate=1.0
    )
    set_learning_rate(optimizer, 0.5)
    rates = {id(w): group["lr"] for group in optimizer.param_groups for w in group["params"]}
    assert rates[id(model.lm_head.weight)] == 0.125
    assert rates[id(model.hidden.weight)] == 0.5


def test_unknown_optimizer_names_the_known_ones(make_net: Make) -> None:
    section = TrainSection().model_copy(update={"optimizer": "sgd"})
    with pytest.raises(ConfigError, match="'sgd' is unknown") as caught:
        build_optimizer(make_net(), section)
    assert "adamw8bit" in str(caught.value)
