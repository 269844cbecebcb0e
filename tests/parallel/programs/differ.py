"""One process of two that were started with different things, one after the other in one world.

RANK=… WORLD_SIZE=… differ.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.errors import ConfigError
from hearth.parallel.world import World, joined
from hearth.training import Trainer

MODEL = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def rows(num: int, seed: int) -> list[dict[str, Any]]:
    ids = np.random.default_rng(seed).integers(3, 64, (num, 9))
    other = {"position_ids": np.arange(8), "segment_ids": np.zeros(8, dtype=int)}
    return [{"input_ids": row[:-1], "labels": row[1:], **other} for row in ids]


def attempts(recipe: Recipe, world: World) -> Iterator[tuple[str, Any]]:
    second = world.rank == 1
    train = {"train": recipe.train.model_copy(update={"learning_rate": 0.5})}
    yield (
        "recipe",
        lambda: Trainer.from_recipe(recipe.model_copy(update=train if second else {}), world=world),
    )
    yield "resume", lambda: Trainer.from_recipe(recipe, world=world, resume="a" if second else "b")
    for name in ("__version__", "torch.__version__", "transformers.__version__"):

        def version(name: str = name) -> None:
            with mock.patch(f"hearth.training.identity.{name}", "9.9.9" if second else "1.0.0"):
                Trainer.from_recipe(recipe, world=world)

        yield name, version

    def data(num: int, seed: int) -> Trainer:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL))
        return Trainer(model=model, train_dataset=rows(num, seed), config=recipe, world=world)

    yield "data", lambda: data(16, int(second))
    yield "number", lambda: data(16 + int(second), 0)


def main() -> None:
    torch.set_num_threads(1)
    train = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}
    recipe = Recipe.model_validate({"train": train, "data": {"sequence_length": 8}})
    found = {}
    with joined(recipe.parallel, torch.device("cpu")) as world:
        for name, attempt in attempts(recipe, world):
            try:
                attempt()
            except ConfigError as error:
                found[name] = str(error)
    os.write(1, f"RESULT {json.dumps(found)}\n".encode())


if __name__ == "__main__":
    main()
