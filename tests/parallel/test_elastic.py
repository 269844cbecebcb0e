"""A run that stops goes on in any other layout: the same samples, the same weights but for rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hearth.workspace import Workspace

MODEL = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
STEPS = 9
ONE: tuple[int, dict[str, Any]] = (1, {})
CHAINS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "2-4-1": [(2, {"data": 2}), (4, {"data": 2, "shard": 2}), ONE],
    "fsdp-tp": [(2, {"shard": 2}), (2, {"tensor": 2}), (2, {"data": 2})],
    "pipeline": [ONE, (2, {"pipeline": 2}), (2, {"shard": 2})],
}


def recipe_of(parallel: dict[str, Any]) -> dict[str, Any]:
    return {
        "parallel": parallel,
        "data": {"sequence_length": 24},
        "model": {"context_length": 64},
        "checkpoint": {"every": 2},
        "train": {
            "steps": STEPS,
            "batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "evaluate_every": 4,
            "ema_decay": 0.5,
        },
    }


def result_of(texts: list[str]) -> dict[str, Any]:
    (line,) = (line for line in texts[0].splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def fit(launch: Any, tmp_path: Path, num: int, parallel: dict[str, Any], **settings: Any) -> dict[str, Any]:
    path = tmp_path / f"settings-{len(list(tmp_path.glob('settings-*')))}.json"
    path.write_text(json.dumps({"recipe": recipe_of(parallel), "model": MODEL, **settings}))
    return result_of(launch("fit", num, [str(path)]))


@pytest.mark.parametrize(
    "name",
    [
        "fsdp-tp",
        pytest.param("2-4-1", marks=pytest.mark.slow),
        pytest.param("pipeline", marks=pytest.mark.slow),
    ],
)
def test_another_layout_goes_on_with_the_same_samples(
    launch: Any, tmp_path: Path, workspace_dir: Path, name: str
) -> None:
    straight = fit(launch, tmp_path, *ONE)
    run: str | None = None
    for number, (num, parallel) in enumerate(CHAINS[name]):
        last = number == len(CHAINS[name]) - 1
        found = fit(launch, tmp_path, num, parallel, resume=run, stop=None if last else 3 * (number + 1))
        assert found["status"] == ("finished" if last else "interrupted")
        run = found["run"]
    with Workspace.open() as workspace:
        expected, got = workspace.runs.get(straight["run"]), workspace.runs.get(str(run))
        for metric in ("loss", "grad_norm", "eval_loss"):
            pairs = [{point.step: point.value for point in each.metrics(metric)} for each in (expected, got)]
            assert pairs[0].keys() == pairs[1].keys()
            for step, value in pairs[0].items():
                assert pairs[1][step] == pytest.approx(value, rel=1e-9), (metric, step)
        weights = [load_file(each.dir / "model" / "model.safetensors") for each in (expected, got)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-6, atol=1e-7)
