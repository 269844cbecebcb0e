"""One process of the test of trials: micro-batches of any size, steps that are timed, steps that break.

RANK=… WORLD_SIZE=… trials.py SETTINGS.json

Says ``RESULT`` with what this process found.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.errors import NonFiniteError, TrainingError
from hearth.parallel.tensor import gathered
from hearth.parallel.world import World, joined
from hearth.training import Batch, Trainer
from hearth.training.checkpoint.together import in_all

LENGTH, VOCAB, POISON = 24, 64, 63


def make_rows() -> list[dict[str, Any]]:
    """Twelve rows; only row 7 has the token POISON."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        tokens = rng.integers(3, POISON, LENGTH + 1)
        tokens[5] = POISON if number == 7 else tokens[5]
        rows.append(
            {
                "input_ids": tokens[:-1],
                "labels": tokens[1:],
                "position_ids": np.arange(LENGTH),
                "segment_ids": np.zeros(LENGTH, dtype=int),
            }
        )
    return rows


class Poisoned(Trainer):
    """Its loss is not finite for a row with POISON."""

    def compute_loss(self, model: nn.Module, batch: Batch) -> Any:
        losses: Any = super().compute_loss(model, batch)
        factor = float("nan") if bool((batch.input_ids_BT == POISON).any()) else 1.0
        return dataclasses.replace(losses, sums={unit: loss * factor for unit, loss in losses.sums.items()})


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: gathered(each.detach()).clone() for name, each in trainer.model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def timed(make: Any) -> dict[str, Any]:
    """What auto finds, and whether measuring steps leaves everything as it was."""
    trainer = make(Trainer, micro_batch_size="auto")
    before, generator = weights_of(trainer), torch.get_rng_state()
    size = trainer.micro_batch_size
    seconds = trainer.measure_step_seconds(2)
    return {
        "size": size,
        "seconds": seconds > 0,
        "unchanged": same(before, weights_of(trainer)) and torch.equal(generator, torch.get_rng_state()),
        "loss": trainer.train_step(0).loss,
    }


def broken(make: Any) -> dict[str, Any]:
    """Both ways to go on after a step that is not finite. The rows of the last step reach over an epoch."""
    trainer = make(Poisoned, on_non_finite="skip")
    said, kept = [], []
    for step in range(3):
        before = weights_of(trainer)
        said.append(trainer.train_step(step).skipped)
        kept.append(same(before, weights_of(trainer)))
    stopping = make(Poisoned)
    errors = []
    for step in range(3):
        try:
            stopping.train_step(step)
        except NonFiniteError as error:
            errors.append(str(error))
    return {"said": said, "kept": kept, "errors": errors}


def told(world: World) -> bool:
    """Whether this process hears of what fails in the last one alone."""
    try:
        in_all(world, lambda: 1 // (world.size - 1 - world.rank))
    except (TrainingError, ZeroDivisionError) as error:
        return "ZeroDivisionError" in f"{type(error).__name__}: {error}"
    return False


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    config = AutoConfig.for_model(**settings["model"])

    def make_in(world: World) -> Any:
        def make(kind: type[Trainer], **train: Any) -> Trainer:
            torch.manual_seed(0)
            values = {"steps": 3, "batch_size": 8, "micro_batch_size": 2, "precision": "fp32", **train}
            recipe = Recipe.model_validate(
                {"parallel": settings["parallel"], "data": {"sequence_length": LENGTH}, "train": values}
            )
            model = AutoModelForCausalLM.from_config(config).double()
            return kind(model=model, train_dataset=make_rows(), config=recipe, world=world, progress=False)

        return make

    section = Recipe.model_validate({"parallel": settings["parallel"]}).parallel
    with joined(section, torch.device("cpu")) as world:
        make = make_in(world)
        found = {**timed(make), **broken(make), "told": told(world)}
        print("RESULT", json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
