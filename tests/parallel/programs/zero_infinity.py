"""One process of the DeepSpeed test: trains a tiny model in float32 and writes what came of it.

RANK=… WORLD_SIZE=… zero_infinity.py SETTINGS.json OUT.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from parity import make_rows
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.parallel.world import joined
from hearth.training import Trainer


class Odd(Trainer):
    """Its loss counts twice as many tokens as its batches say, and is infinite in one step."""

    breaks_at = -1
    at = 0

    def train_step(self, step: int) -> Any:
        self.at = step
        return super().train_step(step)

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> Any:
        losses = super().compute_loss(model, batch)
        total, count = losses.sums["tokens"], losses.counts["tokens"]
        return (total * float("inf") if self.at == self.breaks_at else total), 2 * int(count)


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in ("model", "optimizer")
        for name, tensor in trainer.stateful[part].state_tensors().items()
    }


def state_file(trainer: Trainer, path: Path) -> Path:
    found = state_of(trainer)
    if trainer.world.is_main:
        save_file({name: tensor.clone() for name, tensor in found.items()}, path)
    trainer.world.gather(None)
    return path


def load_state(trainer: Any, path: Path) -> None:
    saved = load_file(path)
    for part in ("model", "optimizer"):
        own = {
            name.partition(".")[2]: tensor for name, tensor in saved.items() if name.startswith(f"{part}.")
        }
        trainer.stateful[part].load_state_tensors(own)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipe = Recipe.model_validate(settings["recipe"])
    config = AutoConfig.for_model(**settings["model"])
    model = AutoModelForCausalLM.from_config(config)
    with joined(recipe.parallel, torch.device("cpu")) as world:
        rows = make_rows(config.vocab_size)
        kind = Odd if "breaks_at" in settings else Trainer
        trainer = kind(
            model=model,
            train_dataset=rows,
            eval_dataset=rows[:6],
            config=recipe,
            world=world,
            progress=False,
        )
        if isinstance(trainer, Odd):
            trainer.breaks_at = settings["breaks_at"]
        results = [trainer.train_step(step) for step in range(2)]
        back = state_file(trainer, Path(sys.argv[2]).with_suffix(".state"))
        trainer.train_step(2)  # undone by what is loaded
        load_state(trainer, back)
        results += [trainer.train_step(step) for step in range(2, settings["steps"])]
        evaluated = trainer.evaluate()
        found = state_of(trainer)
        found["losses"] = torch.tensor([each.loss for each in results], dtype=torch.float64)
        found["norms"] = torch.tensor([each.grad_norm for each in results], dtype=torch.float64)
        found["eval"] = torch.tensor(evaluated["eval_loss"], dtype=torch.float64)
        if recipe.parallel.offload_dir is not None:
            files = Path(recipe.parallel.offload_dir).rglob("*.swp")
            found["disk_bytes"] = torch.tensor(sum(file.stat().st_size for file in files))
        if world.is_main:
            save_file({name: tensor.clone() for name, tensor in found.items()}, sys.argv[2])


if __name__ == "__main__":
    main()
