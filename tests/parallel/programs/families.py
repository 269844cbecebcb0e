"""One process that runs tiny models of many families, whole and spread, and says how far they are apart.

RANK=… WORLD_SIZE=… families.py SETTINGS.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config.parallel import ParallelSection
from hearth.parallel.apply import parallelize
from hearth.parallel.world import World, joined

LENGTH = 24


def tiny(family: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    defaults = AutoConfig.for_model(family)
    sizes = {key: value for key, value in settings["sizes"].items() if hasattr(defaults, key)}
    latent = settings["latent"] if hasattr(defaults, "q_lora_rank") else {}
    values = {**sizes, **settings["tiny"], **latent}
    config = AutoConfig.for_model(family, **values)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data.add_(torch.rand_like(weight) * 0.1)
    return model


@torch.no_grad()
def difference(model: Any, world: World, section: ParallelSection) -> float:
    """Largest difference of logits of this process's positions, in all processes."""
    ids = torch.randint(3, 64, (2, LENGTH))
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    spread = parallelize(model, world, section, sequence_length=LENGTH)
    own = torch.arange(LENGTH)
    if spread.context is not None:
        spread.context.begin(torch.zeros(2, LENGTH, dtype=torch.long))
        own = spread.context.positions_Q
    assert spread.module is not None
    logits = spread.module(
        lambda m: m(input_ids=ids[:, own], position_ids=positions[:, own], use_cache=False).logits
    )
    return float(max(world.gather(float((logits - whole[:, own]).abs().max()))))


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    section = ParallelSection.model_validate(settings["parallel"])
    with joined(section, torch.device("cpu")) as world:
        found = {
            family: difference(tiny(family, settings), world, section) for family in settings["families"]
        }
    os.write(1, f"RESULT {json.dumps(found)}\n".encode())


if __name__ == "__main__":
    main()
