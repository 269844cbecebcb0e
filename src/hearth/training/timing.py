"""How long an optimizer step takes here, found by making some, of which nothing stays."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from hearth.errors import ConfigError
from hearth.training import rng
from hearth.training.clipping import local
from hearth.training.passes import Passes
from hearth.training.performance import StepClock
from hearth.training.updates import Updates

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer


def median_step_seconds(trainer: Trainer, num_steps: int) -> float:
    """Median seconds of an optimizer step, after one to warm up. Of several processes all must ask.

    The steps are made with an optimizer of their own; weights and random state are put back. Raises
    ConfigError where DeepSpeed has the only optimizer.
    """
    if trainer.config.parallel.engine == "deepspeed":
        raise ConfigError(
            "parallel.engine deepspeed: its steps cannot be tried and undone",
            fix="look at tokens_per_second of a run",
        )
    trial = copy.copy(trainer)
    if not trainer._objective_started:
        trial.total_steps = num_steps + 1  # what an objective prepares for a run, it prepares for these
    trial.passes = Passes(trial, trainer.passes.spread)
    trial.updates = Updates(trial.model, trainer.config.train, precision=trainer.precision)
    trial.optimizer = trial.updates.optimizer
    trial.clock = StepClock(trainer.device)
    steps = [step % trial.total_steps for step in range(num_steps + 1)]
    with _put_back(trainer.model):
        seconds = [trial.train_step(step).seconds for step in steps]
    return statistics.median(seconds[1:])


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Weights, buffers and random state are afterwards what they were; of gradients there are none."""
    before, training = rng.capture(), model.training
    kept = [(each, local(each).detach().clone()) for each in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for each, value in kept:
                local(each).copy_(value)
        for weight in model.parameters():
            weight.grad = None
        model.train(training)
        rng.restore(*before)
