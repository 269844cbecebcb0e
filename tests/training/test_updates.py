"""Optimisation inside of the training loop: exact resume, skipped steps, averages, every optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hearth.errors import ConfigError, Interrupted, NonFiniteError
from hearth.models import load_model
from hearth.training.callbacks import Callback
from hearth.training.optimizers.build import OPTIMIZERS

Make = Callable[..., Any]


class StopAt(Callback):
    """Asks to stop after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def on_step(self, trainer: Any, step: int, metrics: Any) -> None:
        if step == self.at:
            trainer.request_stop("test")


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def continues_exactly(train_parts: Make, workspace: Any, train: dict[str, Any]) -> Any:
    """A run that is stopped and resumed has the weights of one that is not, bit for bit."""
    straight = train_parts(train=train)
    straight.fit()
    with pytest.raises(Interrupted):
        train_parts(train=train, callbacks=[StopAt(3)]).fit()
    resumed = train_parts(train=train, resume=workspace.runs.list(status="interrupted")[0].id)
    run = resumed.fit()
    for name, weight in weights(straight).items():
        assert torch.equal(weights(resumed)[name], weight), name
    return straight, run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_resumes_exactly(name: str, train_parts: Make, workspace: Any) -> None:
    rate = {"adafactor": 0.1, "lion": 3e-3}.get(name, 1e-2)
    train = {"optimizer": name, "learning_rate": rate, "warmup_steps": 0, "schedule": "constant"}
    straight, run = continues_exactly(train_parts, workspace, train)
    losses = [point.value for point in run.metrics("loss")]
    assert losses[-1] < losses[0] - 0.3
    assert len(losses) == straight.total_steps


def test_fp16_resumes_exactly(train_parts: Make, workspace: Any) -> None:
    straight, _ = continues_exactly(train_parts, workspace, {"precision": "fp16"})
    assert straight.updates.scaler.factor == 2.0**16
    assert straight.updates.scaler.num_good_steps == 8


def test_an_overflow_in_fp16_skips_the_update_and_uses_up_the_step(train_parts: Make) -> None:
    trainer = train_parts(train={"precision": "fp16"})
    trainer.updates.scaler.factor = 2.0**60
    before = weights(trainer)
    first = trainer.train_step(0)
    assert "loss is scaled by 5.76461e+17 now" in first.skipped
    assert math.isfinite(first.loss)
    assert all(torch.equal(before[name], weight) for name, weight in weights(trainer).items())
    assert not trainer.optimizer.state
    trainer.updates.scaler.factor = 2.0**10
    second = trainer.train_step(1)
    assert not second.skipped
    assert second.lr == trainer.learning_rate(1)
    assert any(not torch.equal(before[name], weight) for name, weight in weights(trainer).items())


def test_an_overflow_without_a_factor_is_an_error(train_parts: Make) -> None:
    trainer = train_parts(train={"precision": "fp16"})
    trainer.updates.scaler.factor = 1.0
    next(weight for weight in trainer.model.parameters() if weight.ndim == 2).register_hook(
        lambda gradient: gradient * math.inf
    )
    with pytest.raises(NonFiniteError, match="gradient norm"):
        trainer.train_step(0)


def test_fp16_trains_as_fp32_does(train_parts: Make) -> None:
    exact = train_parts(train={"precision": "fp32"})
    half = train_parts(train={"precision": "fp16"})
    for step in range(8):
        expected, found = exact.train_step(step), half.train_step(step)
        assert found.loss == pytest.approx(expected.loss, rel=0.01)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=0.05)


def test_the_average_is_measured_saved_and_resumes_exactly(train_parts: Make, workspace: Any) -> None:
    straight, run = continues_exactly(train_parts, workspace, {"ema_decay": 0.8, "evaluate_every": 4})
    left = dict(load_model(run.dir / "model").named_parameters())
    for name, weight in weights(straight).items():
        assert torch.equal(left[name], weight), name  # what `fit` leaves in the model is the average
    plain = train_parts(train={"evaluate_every": 4})
    other = plain.fit()
    assert any(not torch.equal(weights(plain)[name], weight) for name, weight in weights(straight).items())
    losses, averaged = other.metrics("eval_loss"), run.metrics("eval_loss")
    assert [point.step for point in losses] == [point.step for point in averaged]
    assert losses[-1].value != averaged[-1].value
    # The weights that train are the same with and without an average of them.
    assert [p.value for p in other.metrics("loss")] == [p.value for p in run.metrics("loss")]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_step(mode: str, train_parts: Make) -> None:
    plain = train_parts()
    checkpointed = train_parts(train={"activation_checkpointing": mode})
    for step in range(3):
        expected, found = plain.train_step(step), checkpointed.train_step(step)
        assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
    assert all(torch.equal(weights(plain)[name], weight) for name, weight in weights(checkpointed).items())


def test_frozen_groups_stay_and_the_rest_trains(train_parts: Make) -> None:
    groups = [{"match": "*.layers.0.*", "freeze": True}]
    trainer = train_parts(train={"parameter_groups": groups})
    before = weights(trainer)
    trainer.train_step(0)
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(before[name], weight)}
    assert moved
    assert not any(".layers.0." in name for name in moved)


def test_a_group_that_matches_nothing_is_refused_before_any_work(train_parts: Make) -> None:
    with pytest.raises(ConfigError, match=r"parameter_groups\[0\].*matches no weight"):
        train_parts(train={"parameter_groups": [{"match": "*.lm_haed.*"}]})


def test_fp8_is_refused_where_there_is_none(train_parts: Make) -> None:
    with pytest.raises(ConfigError, match="fp8"):
        train_parts(train={"precision": "fp8"})
