"""Every objective learns the same however its model and its rows are spread over processes, in float64.

Figures are those of training, of an evaluation before and one after it, whose rows do not divide.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hearth.parallel.world import World

PROGRAM = Path(__file__).parent / "programs" / "objectives.py"
REINFORCE = {
    "rewards": [
        {"name": "contains", "options": {"field": "answer"}},
        {"name": "length", "options": {"target": 3}},
    ],
    "num_generations": 4,
    "max_new_tokens": 6,
    "kl_weight": 0.05,
    "iterations": 2,
}
# A base that is never opened: adapters are part of a checkpoint only with one.
ADAPTER = {"base": "elsewhere", "adapter": {"rank": 4, "alpha": 16, "dropout": 0.0}}


def preference(objective: str, **settings: Any) -> dict[str, Any]:
    return {"train": {"objective": objective, "preference": settings}}


CASES: dict[str, dict[str, Any]] = {
    "pretrain": {"train": {"objective": "pretrain"}},
    "sft": {"train": {"objective": "sft", "micro_batch_size": 2}},
    "dpo, table": preference("dpo", reference="precompute", sft_weight=0.5),
    "dpo, model": preference("dpo", reference="model"),
    "ipo": preference("ipo", reference="model"),
    "kto, table": preference("kto", reference="precompute", desirable_weight=1.3),
    "kto, model": preference("kto", reference="model", sft_weight=0.5),
    "orpo": preference("orpo"),
    "simpo": preference("simpo", beta=2.0, gamma=0.6),
    "reward": preference("reward", center_weight=0.05),
    "distill": {"train": {"objective": "distill", "distill": {"weight": 0.6, "temperature": 1.7}}},
    "grpo": {"train": {"objective": "grpo", "reinforce": REINFORCE}},
    "ppo": {"train": {"objective": "ppo", "reinforce": REINFORCE}},
}
ADAPTED: dict[str, dict[str, Any]] = {
    "sft, adapter": {**CASES["sft"], "model": ADAPTER},
    "dpo, adapter": {**preference("dpo", reference="adapter"), "model": ADAPTER},
    "dpo, table and adapter": {**CASES["dpo, table"], "model": ADAPTER},
    "kto, adapter": {**preference("kto", reference="adapter"), "model": ADAPTER},
    "grpo, adapter": {**CASES["grpo"], "model": ADAPTER},
}
# What goes through a pipeline: others need all weights at once, and are refused.
STAGED = ("pretrain", "sft", "dpo, table", "kto, table", "orpo", "simpo", "distill")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp2": (2, {"data": 2}),
    "fsdp2": (2, {"shard": 2}),
    "tp2": (2, {"tensor": 2}),
    "zero2": (2, {"shard": 2, "zero": 2}),
    "ddp2-tp2": (4, {"data": 2, "tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
}


@pytest.fixture(scope="module")
def one_process() -> Callable[[dict[str, Any]], dict[str, torch.Tensor]]:
    """What comes of cases in this process, each trained once."""
    spec = importlib.util.spec_from_file_location("objectives_program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    known: dict[str, dict[str, torch.Tensor]] = {}

    def train(cases: dict[str, Any]) -> dict[str, torch.Tensor]:
        for name, case in cases.items():
            if name not in known:
                known[name] = program.train_by_each({name: case}, {}, World.alone(torch.device("cpu")))
        return {key: value for name in cases for key, value in known[name].items()}

    return train


def train(
    launch: Any, folder: Path, num: int, parallel: dict[str, Any], cases: dict[str, Any]
) -> dict[str, torch.Tensor]:
    settings, out = folder / "settings.json", folder / "found.safetensors"
    settings.write_text(json.dumps({"parallel": parallel, "cases": cases}))
    launch("objectives", num, [str(settings), str(out)], seconds=900)
    return load_file(out)


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # The engine computes in float32, and other prompts beside one change the last bits of its sums.
        rough = key.endswith("engine_mismatch")
        torch.testing.assert_close(
            found[key],
            value,
            rtol=1e-4 if rough else 1e-9,
            atol=1e-6 if rough else 1e-12,
            msg=lambda text, key=key: f"{key}: {text}",
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LAYOUTS)
def test_as_one_process(launch: Any, tmp_path: Path, one_process: Any, name: str) -> None:
    num, parallel = LAYOUTS[name]
    if "pipeline" in parallel:
        cases = {name: CASES[name] for name in STAGED}
    else:
        cases = CASES if "tensor" in parallel else {**CASES, **ADAPTED}  # adapters are not cut
    compare(train(launch, tmp_path, num, parallel, cases), one_process(cases))


@pytest.mark.parametrize("name", ["ddp2", "fsdp2", "tp2"])
def test_with_a_baseline_as_one_process(launch: Any, tmp_path: Path, one_process: Any, name: str) -> None:
    cases = {"kto, table": CASES["kto, table"]}
    compare(train(launch, tmp_path, *LAYOUTS[name], cases), one_process(cases))
