"""What is tried before or beside training, where several processes try it: all do the same, and find it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

MODEL = {
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
LAYOUTS = {"ddp2": {"data": 2}, "fsdp2": {"shard": 2}, "tp2": {"tensor": 2}}


def found_by(launch: Any, folder: Path, num: int, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    settings = folder / f"trials-{num}.json"
    settings.write_text(json.dumps({"parallel": parallel, "model": MODEL}))
    lines = [line for text in launch("trials", num, [str(settings)]) for line in text.splitlines()]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LAYOUTS)
def test_trials_as_in_one_process(launch: Any, tmp_path: Path, name: str) -> None:
    (one,) = found_by(launch, tmp_path, 1, {})
    everywhere = found_by(launch, tmp_path, 2, LAYOUTS[name])
    for found in everywhere:
        assert found == everywhere[0], "skipping, or taking other sizes, each for itself"
        assert found["size"] == (8 if "tensor" in LAYOUTS[name] else 4), "what a process has of a step"
        assert found["seconds"]
        assert found["told"]
        assert found["unchanged"]
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-9)
        assert found["kept"] == one["kept"]
        assert [bool(text) for text in found["said"]] == [bool(text) for text in one["said"]] == found["kept"]
        assert any(found["kept"])
        assert not all(found["kept"])
        assert len(found["errors"]) == sum(found["kept"])
        assert all("row 7" in text for text in (*found["errors"], *filter(None, found["said"])))
