"""One process that is to train models spread in ways that cannot be, one after the other.

RANK=… WORLD_SIZE=… refuse.py SETTINGS.json
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.errors import ConfigError
from hearth.parallel.world import joined
from hearth.training import Trainer


def make_rows() -> Any:
    spec = importlib.util.spec_from_file_location("fit", Path(__file__).with_name("fit.py"))
    assert spec is not None
    assert spec.loader is not None
    fit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fit)
    return fit.make_rows(16, 0)


def main() -> None:
    torch.set_num_threads(1)
    said = {}
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        os.environ["MASTER_PORT"] = case["port"]
        recipe = Recipe.model_validate(case["recipe"])
        try:
            with joined(recipe.parallel, torch.device("cpu")) as world:
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**case["model"]))
                Trainer(model=model, train_dataset=make_rows(), config=recipe, world=world, progress=False)
        except ConfigError as error:
            said[name] = str(error)
    os.write(1, f"RESULT {json.dumps(said)}\n".encode())


if __name__ == "__main__":
    main()
