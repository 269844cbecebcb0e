"""One process that starts a recipe's model, in parts or as a whole, and says how much memory that took.

RANK=… WORLD_SIZE=… peak.py SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hearth.config import Recipe
from hearth.models.building import build_model
from hearth.models.in_parts import build_in_parts
from hearth.parallel.apply import parallelize
from hearth.parallel.world import joined


def memory(field: str) -> int:
    """``VmRSS``: bytes of this process now; ``VmHWM``: the most since `forget`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget() -> int:
    """Measure the peak from here on; the bytes of now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(settings["recipe"])
    with joined(recipe.parallel, torch.device("cpu")) as world:
        build_model(Recipe.model_validate({"model": {"size": "1M"}}).model, vocab_size=64)  # imports
        before = forget()
        if settings["in_parts"]:
            parts = build_in_parts(recipe.model, vocab_size=64)
            assert parts is not None
            model, source = parts.model, parts.source
        else:
            model, source = build_model(recipe.model, vocab_size=64), None
        parallelize(model, world, recipe.parallel, sequence_length=16, source=source)
        took = world.gather(memory("VmHWM") - before)
        num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        if world.is_main:
            print("RESULT", json.dumps({"took": took, "weights": num_bytes}))  # noqa: T201


if __name__ == "__main__":
    main()
