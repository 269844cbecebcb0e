"""What of a recipe does not go with its section ``parallel``, found before anything is built."""

from __future__ import annotations

import math
from typing import Any

from hearth.config.recipe import Recipe
from hearth.errors import ConfigError
from hearth.parallel.checks import check_micro_batches, check_model, check_settings, check_training
from hearth.parallel.layout import Layout
from hearth.parallel.meeting import is_launched
from hearth.parallel.world import World


def check_recipe(recipe: Recipe, world: World) -> None:
    """Raise ConfigError, in every process, for settings that do not go together or would do nothing."""
    section, train = recipe.parallel, recipe.train
    if world.size == 1 and is_launched():
        raise ConfigError(
            "this process is one of several (WORLD_SIZE), but was given no world: each would train alone",
            fix="pass `world` of hearth.parallel.world.joined to the trainer, or unset WORLD_SIZE",
        )
    layout = Layout.of(section, world.size)  # a recipe for several processes does not run in one
    check_settings(section, layout)
    if train.micro_batch_size == "auto" and (layout.pipeline > 1 or section.engine == "deepspeed"):
        raise ConfigError(
            "train.micro_batch_size auto is found by trying single passes, which neither a pipeline nor "
            "DeepSpeed makes",
            fix="give a number of rows; `hearth plan` estimates what fits",
        )
    check_training(section, layout, optimizer=train.optimizer, compiled=train.compile)
    _check_shares(recipe, layout)
    if section.reduce == "powersgd":
        _check_powersgd(recipe)


def _check_shares(recipe: Recipe, layout: Layout) -> None:
    train, shares = recipe.train, layout.batch_ranks
    size = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    if train.batch_size % (shares * size):
        fix = f"train.batch_size={-(-train.batch_size // (shares * size)) * shares * size}"
        if train.batch_size % shares == 0:
            fix = f"train.micro_batch_size={math.gcd(size, train.batch_size // shares)}, or {fix}"
        raise ConfigError(
            f"train.batch_size {train.batch_size} cannot be shared by {shares} processes in micro-batches "
            f"of {size}",
            fix=f"use {fix}",
        )
    check_micro_batches(recipe.parallel, train.batch_size // (shares * size))


def _check_powersgd(recipe: Recipe) -> None:
    """What it leaves out of a step it adds to the next one: it must be finite, and of the same scale."""
    for key, value in (("precision", "fp16"), ("on_non_finite", "skip")):
        if getattr(recipe.train, key) == value:
            raise ConfigError(
                f"parallel.reduce powersgd with train.{key} {value}: a gradient that overflows would stay in "
                "what it remembers of each step",
                fix=f"use reduce: bf16, or another train.{key}",
            )


def check_spreadable(recipe: Recipe, model: Any, sequence_length: int) -> None:
    """The same for the model, whole or on the meta device, and the length of its rows."""
    config = getattr(model, "config", None)
    if config is None:
        return
    if hasattr(model, "peft_config") and recipe.parallel.pipeline > 1:
        raise ConfigError(
            f"parallel.pipeline {recipe.parallel.pipeline} does not take model.adapter",
            fix="use parallel.shard",
        )
    check_model(recipe.parallel, config, sequence_length=sequence_length)


def common_things(trainer: Any) -> dict[str, Any]:
    """What processes must have found alike when they began, by what a message calls it."""
    return {
        "the data": trainer.dataset_fingerprint,
        "the number of training rows": len(trainer.rows),
        "what train.precision means here": trainer.precision,
        "the kind of device": trainer.device.type,
    }
