"""One process of the parity test: trains a tiny model in float64 and writes what came of it.

RANK=… WORLD_SIZE=… parity.py SETTINGS.json OUT.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.parallel.world import joined
from hearth.training import Trainer

LENGTH, ROWS = 24, 64


def make_rows(vocab_size: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(ROWS):
        cut = int(rng.integers(4, LENGTH - 4))
        tokens = rng.integers(3, vocab_size, LENGTH + 1)
        labels = np.where(rng.random(LENGTH) < 0.8, tokens[1:], -100)
        labels[cut - 1] = -100
        rows.append(
            {
                "input_ids": tokens[:-1],
                "labels": labels,
                "position_ids": np.concatenate([np.arange(cut), np.arange(LENGTH - cut)]),
                "segment_ids": np.concatenate([np.zeros(cut), np.ones(LENGTH - cut)]).astype(int),
            }
        )
    return rows


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = Recipe.model_validate(settings["recipe"])
    config = AutoConfig.for_model(**settings["model"])
    # The grouped product of experts has no float64; the written-out loop over them has.
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double()
    with joined(recipe.parallel, torch.device("cpu")) as world:
        rows = make_rows(settings["model"]["vocab_size"])
        trainer = Trainer(model=model, train_dataset=rows, config=recipe, world=world, progress=False)
        results = [trainer.train_step(step) for step in range(settings["steps"])]
        weights = {
            name: (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()
            for name, weight in trainer.model.named_parameters()
        }
        weights["losses"] = torch.tensor([each.loss for each in results], dtype=torch.float64)
        weights["norms"] = torch.tensor([each.grad_norm for each in results], dtype=torch.float64)
        everywhere = world.gather(weights)
        if world.is_main:
            save_file({name: found[name] for found in everywhere for name in found}, sys.argv[2])


if __name__ == "__main__":
    main()
