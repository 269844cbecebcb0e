"""A small student learns more from a teacher than from the data alone in the same number of steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.config import Recipe
from hearth.training import Trainer
from hearth.workspace import Workspace

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.slow


def recipe_of(text: Path, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": {"size": "200K", "context_length": 128},
        "tokenizer": {"vocab_size": 512},
        "data": {
            "sources": [{"path": str(text), "format": "text"}],
            "validation_fraction": 0.05,
            "sequence_length": 128,
            "num_workers": 1,
        },
        "train": {
            "steps": 60,
            "batch_size": 8,
            "micro_batch_size": 8,
            "learning_rate": 4e-3,
            "warmup_steps": 5,
            "precision": "fp32",
        },
    }
    for name, changes in sections.items():
        values[name] = {**values[name], **changes}
    return Recipe.model_validate(values)


def run(recipe: Recipe, workspace: Workspace) -> Any:
    trainer = Trainer.from_recipe(recipe, workspace=workspace, progress=False, device="cpu")
    return trainer, trainer.fit()


def test_a_teacher_beats_the_data_alone(shared_data: Path, workspace_dir: Path) -> None:
    text = shared_data / "tinyshakespeare" / "input.txt"
    if not text.is_file():
        pytest.skip(f"{text} is not there")
    torch.set_num_threads(1)
    with Workspace.open() as workspace:
        big = recipe_of(text, model={"size": "1M", "context_length": 128})
        big = big.model_copy(update={"train": big.train.model_copy(update={"steps": 300})})
        _, taught = run(big, workspace)
        base = str(taught.dir / "model")
        losses: dict[str, list[float]] = {}
        for seed in (0, 1):
            shared: dict[str, Any] = {"tokenizer": {"base": base}}
            train = dict(recipe_of(text).train.model_dump(), seed=seed)
            _, alone = run(recipe_of(text, train={**train, "objective": "pretrain"}, **shared), workspace)
            losses.setdefault("data alone", []).append(alone.summary["eval_loss"])
            for divergence in ("forward",) if seed else ("forward", "jsd"):
                distill = {"teacher": base, "divergence": divergence, "weight": 0.8}
                settings = {**train, "objective": "distill", "distill": distill}
                trainer, _ = run(recipe_of(text, train=settings, **shared), workspace)
                losses.setdefault(divergence, []).append(trainer.evaluate()["eval_ce"])
    logger.info("teacher %.3f, students %s", taught.summary["eval_loss"], losses)
    gains = [alone - ce for alone, ce in zip(losses["data alone"], losses["forward"], strict=True)]
    assert all(gain > 0.05 for gain in gains)  # 0.09 and 0.14 where this was written
