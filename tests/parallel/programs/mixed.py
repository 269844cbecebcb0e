"""One process of a training in bfloat16: its losses, and the types of a layer's weights where it runs.

RANK=… WORLD_SIZE=… mixed.py SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from fit import make_rows
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.parallel.world import joined
from hearth.training import Trainer


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = Recipe.model_validate(settings["recipe"])
    config = AutoConfig.for_model(**settings["model"])
    seen: set[str] = set()
    with joined(recipe.parallel, torch.device("cpu")) as world:
        model = AutoModelForCausalLM.from_config(config)
        layer = model.model.layers[0]

        def look(_module: Any, inputs: Any) -> None:
            if not layer.training:  # tried as a whole, before it is spread
                return
            seen.update(str(weight.dtype) for weight in layer.parameters())
            seen.add(f"hidden {inputs[0].dtype}")

        layer.mlp.register_forward_pre_hook(look)
        rows = make_rows(64, 0)
        trainer = Trainer(model=model, train_dataset=rows, config=recipe, world=world, progress=False)
        results = [trainer.train_step(step) for step in range(8)]
        kept = {str(weight.dtype) for weight in trainer.model.parameters()}
        if world.is_main:
            figures = [[each.loss for each in results], [each.grad_norm for each in results]]
            print("RESULT", json.dumps({"figures": figures, "seen": sorted(seen), "kept": sorted(kept)}))  # noqa: T201


if __name__ == "__main__":
    main()
