"""What a model learns from a batch: one file each over one shared core."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from hearth.config.recipe import TrainSection
from hearth.errors import ConfigError
from hearth.training.objectives.base import Losses, Objective

if TYPE_CHECKING:
    from hearth.config.recipe import Recipe

ENTRY_POINTS = "hearth.objectives"
# Imported when they are asked for: some need much that the others do not.
OBJECTIVES = {
    "pretrain": "hearth.training.objectives.pretrain:Pretrain",
    "sft": "hearth.training.objectives.sft:SupervisedFineTuning",
    "dpo": "hearth.training.objectives.dpo:DPO",
    "ipo": "hearth.training.objectives.ipo:IPO",
    "kto": "hearth.training.objectives.kto:KTO",
    "orpo": "hearth.training.objectives.orpo:ORPO",
    "simpo": "hearth.training.objectives.simpo:SimPO",
    "distill": "hearth.training.objectives.distill:Distillation",
    "reward": "hearth.training.objectives.reward:RewardModel",
    "grpo": "hearth.training.objectives.grpo:GRPO",
    "ppo": "hearth.training.objectives.ppo:PPO",
}
# The sections of `train` that only some objectives read.
_SECTIONS = ("preference", "reinforce", "distill")
_DEFAULTS = TrainSection.model_validate({})


def objective_names() -> list[str]:
    """Every objective that is installed, ours first."""
    return list(dict.fromkeys([*OBJECTIVES, *(point.name for point in entry_points(group=ENTRY_POINTS))]))


def objective_class(name: str) -> type[Objective]:
    """The class that ``train.objective`` names: one of ours, or an entry point of ``hearth.objectives``.

    Raises ConfigError for an unknown name, or for an entry point that is no Objective.
    """
    if name in OBJECTIVES:
        module, _, attribute = OBJECTIVES[name].partition(":")
        found: type[Objective] = getattr(importlib.import_module(module), attribute)
        return found
    points = entry_points(group=ENTRY_POINTS, name=name)
    if not points:
        names = objective_names()
        near = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(
            f"train.objective {name!r} is unknown",
            fix=f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}",
        )
    loaded = next(iter(points)).load()
    if not (isinstance(loaded, type) and issubclass(loaded, Objective)):
        raise ConfigError(
            f"train.objective {name!r}: {loaded!r} is no subclass of hearth.training.Objective",
            fix="let the entry point name a class",
        )
    return loaded


def make_objective(config: Recipe) -> Objective:
    """The objective of a recipe, with its settings. Raises ConfigError for a section it does not read."""
    found = objective_class(config.train.objective)
    reads = _SECTIONS if found.sections is None else found.sections
    for section in _SECTIONS:
        if section not in reads and getattr(config.train, section) != getattr(_DEFAULTS, section):
            raise ConfigError(
                f"train.{section} is given, but the objective {found.name} does not read it",
                fix=f"leave train.{section} out, or choose another train.objective",
            )
    return found(config)


__all__ = ["OBJECTIVES", "Losses", "Objective", "make_objective", "objective_class", "objective_names"]
