"""In bfloat16 sharded weights travel in 16 bits, and what is learnt is what one process learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def trained(
    launch: Any, tmp_path: Path, num: int, parallel: dict[str, Any], precision: str
) -> dict[str, Any]:
    recipe = {
        "parallel": parallel,
        "data": {"sequence_length": 24},
        "train": {
            "steps": 8,
            "batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "precision": precision,
        },
    }
    settings = tmp_path / f"{num}.json"
    settings.write_text(json.dumps({"recipe": recipe, "model": QWEN3}))
    text = launch("mixed", num, [str(settings)])[0]
    (line,) = [line for line in text.splitlines() if line.startswith("RESULT")]
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_weights_travel_in_16_bits(launch: Any, tmp_path: Path, zero: int) -> None:
    one = trained(launch, tmp_path, 1, {}, "bf16")
    two = trained(launch, tmp_path, 2, {"shard": 2, "zero": zero}, "bf16")
    # What is normalised and added up between the layers stays in float32, as under autocast alone.
    assert two["seen"] == ["hidden torch.float32", "torch.bfloat16"]
    assert two["kept"] == ["torch.float32"]
    assert one["figures"][0][-1] < one["figures"][0][0] - 0.5
    for ours, expected in zip(two["figures"], one["figures"], strict=True):
        assert ours == pytest.approx(expected, rel=0.02)
