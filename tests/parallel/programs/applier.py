"""One process of the comparison with transformers' own tensor parallelism, in float64.

RANK=… WORLD_SIZE=… applier.py SETTINGS.json OUT.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hearth.config.parallel import ParallelSection
from hearth.parallel.apply import parallelize
from hearth.parallel.tensor import gathered
from hearth.parallel.world import joined


def values(model: Any, input_ids_BT: Tensor) -> dict[str, Tensor]:
    logits = model(input_ids=input_ids_BT, use_cache=False).logits
    factors_V = torch.linspace(-1.0, 1.0, logits.shape[-1], dtype=torch.float64)
    (logits.square() * factors_V).mean().backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: gathered(tensor.detach()) for name, tensor in ({"logits": logits} | grads).items()}


def main() -> None:
    settings, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    section = ParallelSection.model_validate({"tensor": 2})
    found: dict[str, Tensor] = {}
    with joined(section, torch.device("cpu")) as world:
        for name, shape in settings["models"].items():
            torch.manual_seed(0)
            config = AutoConfig.for_model(**shape)
            # The grouped product of experts has no float64; the written-out loop over them has.
            config._experts_implementation = "eager"
            model = AutoModelForCausalLM.from_config(config).double()
            folder = out.parent / name
            if world.is_main:
                model.save_pretrained(folder)
            dist.barrier()
            theirs = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float64,
                distributed_config=DistributedConfig(tp_plan="auto", tp_size=2),
                experts_implementation="eager",
            )
            input_ids_BT = torch.arange(48).reshape(2, 24) % shape["vocab_size"]
            found |= {f"{name} | theirs | {key}": x for key, x in values(theirs, input_ids_BT).items()}
            parallelize(model, world, section, sequence_length=24)
            found |= {f"{name} | ours | {key}": x for key, x in values(model, input_ids_BT).items()}
            print("done", name, flush=True)  # noqa: T201
        if world.is_main:
            save_file({key: tensor.contiguous().clone() for key, tensor in found.items()}, out)


if __name__ == "__main__":
    main()
