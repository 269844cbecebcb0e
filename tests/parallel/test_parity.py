"""However a model is spread over processes, it learns the same: against one process, in float64.

float32 would hide wrong gradients: a missing sum over a group may be 1e-5 off at first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
}
QWEN3_MOE = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "output_router_logits": False,
}
# 65 words do not divide by 2; the one of padding does not learn.
ODD = {**QWEN3, "vocab_size": 65, "pad_token_id": 40}
# By the first part of a layout's name; the others are for QWEN3. More families: test_tensor.py.
MODELS: dict[str, dict[str, Any]] = {
    "moe": QWEN3_MOE,
    "odd": ODD,
    "tied": {**ODD, "tie_word_embeddings": True},
}
STEPS = 5
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp2": (2, {"data": 2}),
    "zero1": (2, {"shard": 2, "zero": 1}),
    "zero2": (2, {"shard": 2, "zero": 2}),
    "fsdp2": (2, {"shard": 2}),
    "hsdp": (4, {"data": 2, "shard": 2}),
    "tp2": (2, {"tensor": 2}),
    "odd-tp2": (2, {"tensor": 2}),
    "odd-fsdp2-tp2": (4, {"shard": 2, "tensor": 2}),
    "tied-tp2": (2, {"tensor": 2}),
    "tied-fsdp2-tp2": (4, {"shard": 2, "tensor": 2}),
    "tp2-sequence": (2, {"tensor": 2, "sequence": True}),
    "fsdp2-tp2-sequence": (4, {"shard": 2, "tensor": 2, "sequence": True}),
    "tp2-pp2-sequence": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "tp2-cp2-sequence": (4, {"tensor": 2, "context": 2, "sequence": True}),
    "moe-tp2-sequence": (2, {"tensor": 2, "sequence": True}),
    "ddp2-tp2": (4, {"data": 2, "tensor": 2}),
    "fsdp2-tp2": (4, {"shard": 2, "tensor": 2}),
    "pp2-1f1b": (2, {"pipeline": 2}),
    "pp2-interleaved": (2, {"pipeline": 2, "schedule": "interleaved", "stages": 2}),
    "pp2-zero-bubble": (2, {"pipeline": 2, "schedule": "zero_bubble", "stages": 2}),
    "fsdp2-pp2": (4, {"shard": 2, "pipeline": 2}),
    "ddp2-pp2": (4, {"data": 2, "pipeline": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "ddp2-cp2": (4, {"data": 2, "context": 2}),
    "fsdp2-cp2": (4, {"shard": 2, "context": 2}),
    "tp2-cp2": (4, {"tensor": 2, "context": 2}),
    "moe-fsdp2": (2, {"shard": 2}),
    "moe-tp2": (2, {"tensor": 2}),
    "moe-ep2": (2, {"data": 2, "expert": 2}),
    "moe-fsdp2-ep2": (2, {"shard": 2, "expert": 2}),
    "moe-hsdp-ep2": (4, {"data": 2, "shard": 2, "expert": 2}),
    "offload": (2, {"shard": 2, "offload": "cpu"}),
}


def recipe_of(parallel: dict[str, Any]) -> dict[str, Any]:
    return {
        "parallel": parallel,
        "data": {"sequence_length": 24},
        "model": {"context_length": 64},
        "train": {
            "steps": STEPS,
            "batch_size": 16,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "grad_clip": 0.5,
        },
    }


def train(
    launch: Any, tmp_path: Path, name: str, num: int, parallel: dict[str, Any]
) -> dict[str, torch.Tensor]:
    settings, out = tmp_path / f"{name}.json", tmp_path / f"{name}.safetensors"
    model = MODELS.get(name.split("-")[0], QWEN3)
    settings.write_text(json.dumps({"recipe": recipe_of(parallel), "model": model, "steps": STEPS}))
    launch("parity", num, [str(settings), str(out)])
    found: dict[str, torch.Tensor] = load_file(out)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """What one process finds, by model."""
    return {}


# Four processes take twice as long on two cores.
_ROWS = [pytest.param(n, marks=[pytest.mark.slow] if num > 2 else []) for n, (num, _) in LAYOUTS.items()]


@pytest.mark.parametrize("name", _ROWS)
def test_as_one_process(launch: Any, tmp_path: Path, alone: Any, name: str) -> None:
    num, parallel = LAYOUTS[name]
    model = name.split("-")[0] if name.split("-")[0] in MODELS else "qwen3"
    if model not in alone:
        alone[model] = train(launch, tmp_path, f"{model}-one", 1, {})
    expected = alone[model]
    found = train(launch, tmp_path, name, num, parallel)
    assert found.keys() == expected.keys()
    for key, value in sorted(expected.items(), key=lambda item: item[0] not in ("losses", "norms")):
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=f"{key}: {{}}".format)
