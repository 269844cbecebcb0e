"""What a model learns from a batch: one file each over one shared core (``hearth.training.loss``)."""

from __future__ import annotations

from hearth.errors import ConfigError
from hearth.training.objectives.base import Objective
from hearth.training.objectives.pretrain import Pretrain
from hearth.training.objectives.sft import SupervisedFineTuning

OBJECTIVES: dict[str, type[Objective]] = {"pretrain": Pretrain, "sft": SupervisedFineTuning}


def make_objective(name: str) -> Objective:
    """The objective that ``train.objective`` names."""
    if name not in OBJECTIVES:
        raise ConfigError(f"train.objective {name!r} is unknown", fix=f"use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]()


__all__ = ["OBJECTIVES", "Objective", "Pretrain", "SupervisedFineTuning", "make_objective"]
