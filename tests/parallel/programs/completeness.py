"""One process of the test of completeness: spreads a model, perhaps breaks it, and says what the check says.

RANK=… WORLD_SIZE=… completeness.py SETTINGS.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.parallel.apply import parallelize
from hearth.parallel.completeness import inventory, placements, require_complete
from hearth.parallel.world import World, joined


def build(settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings["model"]))


# What may go wrong, after the model was spread.
def drop_parameter(model: Any, world: World) -> None:
    layer = model.model.layers[1]
    if hasattr(layer, "mlp"):  # another stage may have it
        del layer.mlp.up_proj._parameters["weight"]


def drop_parameter_in_one_process(model: Any, world: World) -> None:
    if world.rank == 1:
        drop_parameter(model, world)


def buffer_in_one_process(model: Any, world: World) -> None:
    if world.rank != 0:
        del model.model.rotary_emb._buffers["inv_freq"]


def new_buffer(model: Any, world: World) -> None:
    model.register_buffer("more", torch.zeros(2))


def cut_by_hand(model: Any, world: World) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight[: norm.weight.shape[0] // 2].detach().clone())


def plain_weight(model: Any, world: World) -> None:
    norm = model.model.layers[0].input_layernorm
    weight = norm.weight
    norm.weight = nn.Parameter(
        weight.full_tensor().detach() if isinstance(weight, DTensor) else weight.clone()
    )


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    section = ParallelSection.model_validate(settings["parallel"])
    with joined(section, torch.device("cpu")) as world:
        found: dict[str, Any] = {"complete": {}, "broken": {}}
        for name in [None, *settings["breaks"]]:
            model = build(settings)
            if name == "outside":  # a weight that no plan of a pipeline knows
                model.model.outside = nn.Linear(2, 2)
            before = inventory(model)
            spread = parallelize(model, world, section, sequence_length=24)
            if name not in (None, "outside"):
                globals()[name](model, world)
            if name is None:
                require_complete(before, model, spread.runs, world)
                found["complete"] = {"before": sorted(before), "own": placements(model)}
                continue
            try:
                require_complete(before, model, spread.runs, world)
            except ConfigError as error:
                found["broken"][name] = error.message
            else:
                raise SystemExit(f"{name} was not noticed")
        os.write(1, f"RESULT {json.dumps(found)}\n".encode())


if __name__ == "__main__":
    main()
