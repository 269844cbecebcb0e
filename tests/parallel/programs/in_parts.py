"""One process that builds a recipe's model in parts, and writes what it has of the weights.

RANK=… WORLD_SIZE=… in_parts.py SETTINGS.json OUT.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from hearth.config import Recipe
from hearth.config.recipe import AdapterSection
from hearth.models.building import build_model
from hearth.models.in_parts import build_in_parts
from hearth.parallel.apply import parallelize
from hearth.parallel.world import joined
from hearth.training.adapter import add_adapter
from hearth.training.loss import split_head, use_split_of


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(settings["recipe"])
    with joined(recipe.parallel, torch.device("cpu")) as world:
        model = parts = None
        if settings["in_parts"]:
            parts = build_in_parts(recipe.model, vocab_size=64, seed=3)
            assert parts is not None, "this family is built as a whole"
            model = parts.model
            use_split_of(parts.twin, model)
            assert split_head(model) is not None
        model = model or build_model(recipe.model, vocab_size=64, seed=3)
        if settings.get("adapter"):
            model = add_adapter(model, AdapterSection(), seed=5)
        source = None if parts is None else parts.source
        spread = parallelize(model, world, recipe.parallel, sequence_length=16, source=source)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        found = {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in tensors.items()
        }
        assert not any(tensor.is_meta for tensor in found.values())
        if spread.module is not None:  # and it runs
            ids = torch.arange(16)[None]
            logits = spread.module(lambda m: m(input_ids=ids).logits)
            found["logits"] = (
                (logits.full_tensor() if isinstance(logits, DTensor) else logits).detach().clone()
            )
        everywhere = world.gather(found)
        if world.is_main:
            save_file({name: part[name].contiguous() for part in everywhere for name in part}, sys.argv[2])


if __name__ == "__main__":
    main()
