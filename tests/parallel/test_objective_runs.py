"""A run that stopped goes on in another layout with the reference, and the rollouts, that it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hearth.training.reference_file import read_tables
from hearth.workspace import Workspace

STEPS, STOP = 5, 3  # in the middle of a round of rollouts
REINFORCE = {
    "rewards": [{"name": "contains", "options": {"field": "answer"}}],
    "num_generations": 4,
    "max_new_tokens": 6,
    "iterations": 2,
}
TRAIN = {"steps": STEPS, "evaluate_every": 2, "log_every": 1}
CASES = {
    "dpo": {"train": {**TRAIN, "objective": "dpo", "preference": {"reference": "precompute"}}},
    "kto": {"train": {**TRAIN, "objective": "kto", "preference": {"reference": "model"}}},
    "grpo": {"train": {**TRAIN, "objective": "grpo", "reinforce": REINFORCE}},
}


def fit(
    launch: Any, folder: Path, num: int, parallel: dict[str, Any], resume: Any = None, stop: int = 0
) -> dict[str, str]:
    settings = folder / f"settings-{num}-{stop}.json"
    values = {"parallel": parallel, "cases": CASES, "resume": resume or {}, "stop": stop}
    settings.write_text(json.dumps(values))
    text = launch("runs", num, [str(settings)], seconds=600)[0]
    (line,) = (line for line in text.splitlines() if line.startswith("RESULT "))
    found: dict[str, str] = json.loads(line.removeprefix("RESULT "))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parallel", [{"shard": 2}, {"tensor": 2}], ids=str)
def test_what_a_run_began_with(
    launch: Any, tmp_path: Path, workspace_dir: Path, parallel: dict[str, Any]
) -> None:
    straight = fit(launch, tmp_path, 1, {})
    stopped = fit(launch, tmp_path, 2, parallel, stop=STOP)
    with Workspace.open() as workspace:
        path = workspace.runs.get(stopped["dpo"]).dir / "reference.safetensors"
    before = path.read_bytes()
    resumed = fit(launch, tmp_path, 1, {}, resume=stopped)
    assert resumed == stopped
    assert path.read_bytes() == before, "the table was made again"
    with Workspace.open() as workspace:
        for name in CASES:
            expected, got = (workspace.runs.get(runs[name]) for runs in (straight, resumed))
            for metric in ("loss", "grad_norm", "eval_loss"):
                pairs = [
                    {point.step: point.value for point in run.metrics(metric)} for run in (expected, got)
                ]
                assert pairs[0].keys() == pairs[1].keys()
                for step, value in pairs[0].items():
                    assert pairs[1][step] == pytest.approx(value, rel=1e-9), (name, metric, step)
        one = read_tables(workspace.runs.get(straight["dpo"]).dir / "reference.safetensors")
    both = read_tables(path)
    assert one is not None
    assert both is not None
    assert both.key == one.key, "it knows the same weights, whole or in parts"
    for table, values in one.tables.items():
        np.testing.assert_allclose(both.tables[table], values, rtol=1e-9)
