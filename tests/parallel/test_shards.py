"""What all processes write of a model is the model: every element once, none missing, in any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"data": 2}),
    "hsdp": (4, {"data": 2, "shard": 2}),
    "three": (3, {"shard": 3}),
    "fsdp-tp": (4, {"shard": 2, "tensor": 2}),
    "ddp-tp": (4, {"data": 2, "tensor": 2}),
    "pp-tp": (4, {"pipeline": 2, "tensor": 2}),
    "fsdp-pp": (4, {"shard": 2, "pipeline": 2}),
    "fsdp-cp": (4, {"shard": 2, "context": 2}),
    "hsdp-ep": (4, {"data": 2, "shard": 2, "expert": 2}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if num > 2 else []) for n, (num, _) in LAYOUTS.items()]
)
def test_every_element_is_written_once(launch: Any, tmp_path: Path, name: str) -> None:
    num, parallel = LAYOUTS[name]
    model = {
        "model_type": "qwen3_moe",
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 10,
    }
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"model": model, "parallel": parallel}))
    launch("shards", num, [str(settings), str(tmp_path)])
    whole = load_file(tmp_path / "whole.safetensors")
    times = {tensor: torch.zeros(value.shape, dtype=torch.int32) for tensor, value in whole.items()}
    for rank in range(num):
        places = json.loads((tmp_path / f"{rank}.json").read_text())
        for tensor, local in load_file(tmp_path / f"{rank}.safetensors").items():
            shape, offset = places[tensor]
            assert tuple(shape) == whole[tensor].shape
            box = tuple(slice(at, at + size) for at, size in zip(offset, local.shape, strict=True))
            assert torch.equal(whole[tensor][box], local), f"{tensor} of rank {rank}"
            times[tensor][box] += 1
    wrong = [tensor for tensor, count in times.items() if not bool((count == 1).all())]
    assert not wrong
