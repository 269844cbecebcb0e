"""One process of the tests of `parallel.reduce`: gradients of replicas, added up in all ways there are.

RANK=… WORLD_SIZE=… reduce.py SETTINGS.json OUT.safetensors
"""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.config.parallel import ParallelSection
from hearth.parallel.apply import parallelize
from hearth.parallel.sharding import synchronize_gradients
from hearth.parallel.world import World, joined
from hearth.training import Trainer

VOCAB = 128


class Wire:
    """Bytes that this process gives to all-reduce."""

    def __init__(self) -> None:
        self.num_bytes = 0
        original = dist.all_reduce

        def counted(tensor: Tensor, *others: Any, **settings: Any) -> Any:
            self.num_bytes += tensor.numel() * tensor.element_size()
            return original(tensor, *others, **settings)

        dist.all_reduce = counted


def loss_of(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """A sum that hardly any gradient of which is small."""
    return torch.nn.functional.cross_entropy(model(input_ids=ids_BT).logits[0, :-1], ids_BT[0, 1:])


def batches_of(world: World, num: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + world.rank)
    return [torch.randint(VOCAB, (1, length), generator=generator) for _ in range(num)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, weight in model.named_parameters():
        grad: Any = weight.grad
        assert grad is not None, name
        found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone()
    return found


def reduced(
    settings: dict[str, Any], original: nn.Module, world: World, section: ParallelSection, wire: Wire
) -> dict[str, Tensor]:
    """Gradients of ``repeats`` passes over the same micro-batches, and those of each process by itself."""
    own = batches_of(world, settings["micro_batches"], settings["length"])
    local = copy.deepcopy(original)
    for ids_BT in own:
        loss_of(local, ids_BT).backward()
    found = {f"local{world.rank}/{name}": grad for name, grad in gradients(local).items()}
    model = copy.deepcopy(original)
    module = parallelize(model, world, section, sequence_length=settings["length"]).module
    assert module is not None
    sent = []
    for repeat in range(settings["repeats"]):
        before = wire.num_bytes
        for number, ids_BT in enumerate(own, 1):
            synchronize_gradients(module, section, last=number == len(own))
            module(loss_of, ids_BT).backward()
        sent.append(wire.num_bytes - before)
        found |= {f"{repeat}/{name}": grad for name, grad in gradients(model).items()}
        model.zero_grad(set_to_none=True)
    found["sent"] = torch.tensor(sent)
    return found


def trained(
    settings: dict[str, Any], model: nn.Module, world: World, section: ParallelSection
) -> dict[str, Tensor]:
    """Losses of a run of the trainer, and whether the processes end with the same weights."""
    recipe = Recipe.model_validate({**settings["recipe"], "parallel": section.model_dump()})
    generator = torch.Generator().manual_seed(0)
    length, rows = recipe.data.sequence_length, []
    for _ in range(64):  # something to learn: each word says which one comes next
        steps = torch.randint(1, 3, (length + 1,), generator=generator)
        tokens = (steps.cumsum(0) * 5 % VOCAB).numpy()
        rows.append(
            {
                "input_ids": tokens[:-1],
                "labels": tokens[1:],
                "position_ids": torch.arange(length).numpy(),
                "segment_ids": torch.zeros(length, dtype=torch.int64).numpy(),
            }
        )
    trainer = Trainer(model=model, train_dataset=rows, config=recipe, world=world, progress=False)
    losses = [trainer.train_step(step).loss for step in range(recipe.train.steps)]
    weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    everywhere = world.gather(weights)
    assert all(torch.equal(weights, other) for other in everywhere), "replicas differ"
    return {"losses": torch.tensor(losses, dtype=torch.float64)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings["model"]))
    wire = Wire()
    found: dict[str, Tensor] = {}
    for name, parallel in settings["parallel"].items():
        section = ParallelSection.model_validate(parallel)
        with joined(section, torch.device("cpu")) as world:
            if "recipe" in settings:
                values = trained(settings, copy.deepcopy(model), world, section)
            else:
                values = reduced(settings, model, world, section, wire)
            for part in world.gather(values):
                found |= {f"{name}/{key}": value for key, value in part.items()}
            is_main = world.is_main
            # The next group must not meet in what is left of this one.
            os.environ["MASTER_PORT"] = str(world.from_main(free_port()))
    if is_main:
        save_file(found, sys.argv[2])


if __name__ == "__main__":
    main()
