"""One process of the test of shards: writes its parts, and checks that spreading a whole gives them back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config.parallel import ParallelSection
from hearth.parallel.apply import parallelize
from hearth.parallel.shards import like, part_to_write
from hearth.parallel.tensor import gathered
from hearth.parallel.world import joined


def main() -> None:
    settings, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings["model"]))
    whole = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    section = ParallelSection.model_validate(settings["parallel"])
    with joined(section, torch.device("cpu")) as world:
        parallelize(model, world, section, sequence_length=24)
        parts, places = {}, {}
        for name, weight in model.named_parameters():
            assert torch.equal(gathered(weight.detach()), whole[name]), name
            spread = like(whole[name], weight.detach())
            pair = [t.to_local() if hasattr(t, "to_local") else t for t in (spread, weight.detach())]
            assert torch.equal(*pair), name
            part = part_to_write(weight.detach(), world)
            if part is not None:
                parts[name], places[name] = part.local.contiguous(), (part.shape, part.offset)
        save_file(parts, out / f"{world.rank}.safetensors")
        (out / f"{world.rank}.json").write_text(json.dumps(places))
        if world.is_main:
            save_file(whole, out / "whole.safetensors")


if __name__ == "__main__":
    main()
