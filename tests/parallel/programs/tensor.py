"""One process of the test of tensor parallelism: models of many families, whole and cut, in float64.

RANK=… WORLD_SIZE=… tensor.py SETTINGS.json OUT.safetensors
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config.parallel import ParallelSection
from hearth.parallel.apply import parallelize
from hearth.parallel.tensor import gathered
from hearth.parallel.world import joined
from hearth.training.activation import checkpoint_activations
from hearth.training.batches import Batch, collate
from hearth.training.logprobs import token_logprobs
from hearth.training.loss import split_head, token_loss_sum, use_split_of
from hearth.training.precision import autocast

LENGTH = 24


def make_batch(vocab_size: int) -> Batch:
    """Two documents in each row."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(2):
        tokens = rng.integers(0, vocab_size, LENGTH + 1)
        cut = int(rng.integers(4, LENGTH - 4))
        rows.append(
            {
                "input_ids": tokens[:-1],
                "labels": np.where(rng.random(LENGTH) < 0.8, tokens[1:], -100),
                "position_ids": np.concatenate([np.arange(cut), np.arange(LENGTH - cut)]),
                "segment_ids": np.concatenate([np.zeros(cut), np.ones(LENGTH - cut)]).astype(int),
            }
        )
    return collate(rows, range(2))


@contextlib.contextmanager
def nothing_in_float32() -> Iterator[None]:
    """Norms and routers that ask for float32, which would round away what is compared, get float64."""
    with (
        patch.object(torch, "float32", torch.float64),
        patch.object(torch, "float", torch.float64),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def values(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What training asks of a model."""
    loss, num = token_loss_sum(model, batch)
    logp_N, entropy_N = token_logprobs(model, batch, temperature=0.7, with_entropy=True)
    factors_N = torch.linspace(-1.0, 1.0, len(logp_N), dtype=logp_N.dtype)
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    logits = model(**inputs).logits
    factors_V = torch.linspace(-1.0, 1.0, logits.shape[-1], dtype=logp_N.dtype)
    (
        loss / num + (logp_N * factors_N).sum() / num + (logits.to(logp_N.dtype).square() * factors_V).mean()
    ).backward()
    found = {"loss": loss, "logp": logp_N, "entropy": entropy_N, "logits": logits}
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: gathered(tensor.detach()).contiguous().clone() for name, tensor in (found | grads).items()}


def require_parts(model: Any, num: int, *, sequence: bool) -> None:
    """Words and positions are spread, so that it is not the whole model that gives the same as itself."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert len(module.weight.to_local()) <= -(-len(module.weight) // num)
    norms = [module for module in model.base_model.layers[1].children() if "Norm" in type(module).__name__]

    def check(_module: Any, _inputs: Any, output: Tensor) -> None:
        assert output.shape[1] == (LENGTH // num if sequence else LENGTH)

    assert norms
    for norm in norms:
        norm.register_forward_hook(check)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    found: dict[str, Tensor] = {}
    with joined(ParallelSection.model_validate(settings["parallel"]), torch.device("cpu")) as world:
        for name, case in settings["cases"].items():
            torch.manual_seed(0)
            config = AutoConfig.for_model(**case["model"])
            # The grouped product of experts has no float64; the written-out loop over them has.
            config._experts_implementation = "eager"
            whole = AutoModelForCausalLM.from_config(config).double()
            for weight in whole.parameters():  # biases and norms that begin at 0 and 1 would hide much
                weight.data.add_(torch.randn_like(weight) * 0.05)
            batch = make_batch(case["model"]["vocab_size"])
            for key, way in case["ways"].items():
                model = copy.deepcopy(whole)
                split_head(model)
                checkpoint_activations(model, way.get("checkpointing", "none"))
                if "parallel" in way:
                    section = ParallelSection.model_validate(settings["parallel"] | way["parallel"])
                    parallelize(model, world, section, sequence_length=LENGTH)
                    cut, model = model, copy.deepcopy(model)  # as a reference is made
                    use_split_of(cut, model)
                    require_parts(model, world.layout.tensor, sequence=section.sequence)
                torch.manual_seed(1)  # of dropout
                if way.get("autocast"):
                    with autocast("bf16", torch.device("cpu")):
                        parts = values(model.float(), batch)
                else:
                    with nothing_in_float32():
                        parts = values(model, batch)
                found |= {f"{name} | {key} | {part}": tensor for part, tensor in parts.items()}
                print("done", name, key, flush=True)  # noqa: T201
        if world.is_main:
            save_file(found, sys.argv[2])


if __name__ == "__main__":
    main()
