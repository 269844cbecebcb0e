"""One process of a whole run, with its record, checkpoints and result.

RANK=… WORLD_SIZE=… fit.py SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.errors import Interrupted
from hearth.parallel.world import joined
from hearth.training import Callback, Trainer
from hearth.workspace import Workspace

LENGTH, VOCAB = 24, 64


def make_rows(num: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num):
        tokens = np.cumsum(rng.integers(1, 4, LENGTH + 1)) % (VOCAB - 3) + 3
        rows.append(
            {
                "input_ids": tokens[:-1],
                "labels": tokens[1:],
                "position_ids": np.arange(LENGTH),
                "segment_ids": np.zeros(LENGTH, dtype=int),
            }
        )
    return rows


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, step: int, metrics: Any) -> None:
        if step == self.step:
            trainer.request_stop("as asked")


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = Recipe.model_validate(settings["recipe"])
    config = AutoConfig.for_model(**settings["model"])
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, settings.get("dtype", "float64")))
    callbacks = [StopAt(settings["stop"])] if settings.get("stop") else []
    with joined(recipe.parallel, torch.device("cpu")) as world, Workspace.open() as workspace:
        trainer = Trainer(
            model=model,
            train_dataset=make_rows(61, 0),
            eval_dataset=make_rows(13, 1),
            config=recipe,
            world=world,
            workspace=workspace,
            progress=False,
            resume=settings.get("resume"),
            callbacks=callbacks,
        )
        try:
            run = trainer.fit()
            status = run.status if world.is_main else "finished"
        except Interrupted:
            status = "interrupted"
        assert trainer.run is not None
        if world.is_main:
            print("RESULT", json.dumps({"run": trainer.run.id, "status": status}))  # noqa: T201


if __name__ == "__main__":
    main()
