"""Losses, gradients and metrics against TRL's own trainers; make_golden.py made the numbers and says how.

TRL casts log-probabilities to float32 on the way, so the tolerance is that of float32: 2e-6 of the loss, 2e-5
of each weight's gradient norm.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hearth.training import Trainer
from hearth.training.samples import Sample
from hearth.training.totals import add_up

GOLDEN = json.loads(Path(__file__).with_name("trl.json").read_text(encoding="utf-8"))


def as_sample(row: dict[str, Any], sides: tuple[str, ...]) -> Sample:
    parts = []
    for side in sides:
        tokens = np.asarray(row["prompt"] + row[side], np.int64)
        parts.append((tokens, np.arange(len(tokens)) >= len(row["prompt"])))
    return Sample(tuple(parts), 1.0 if len(sides) == 2 else float(row["label"]))


def gradients_of_step(trainer: Trainer) -> tuple[float, dict[str, float], dict[str, float]]:
    """Loss, gradient norms by weight, and metrics of the first step, without taking it."""
    batches = trainer.objective.batches(trainer, 0, list(range(len(trainer.rows))))
    trainer.model.train()
    loss, metrics = trainer._accumulate(batches, add_up(trainer.objective.counts(batch) for batch in batches))
    weights = trainer.model.named_parameters()
    return float(loss), {n: float(w.grad.norm()) for n, w in weights if w.grad is not None}, metrics


@pytest.mark.parametrize("case", GOLDEN["cases"])
@pytest.mark.parametrize("micro_batch_size", [6, 2])
def test_loss_and_gradients_are_those_of_trl(
    case: str, micro_batch_size: int, golden: ModuleType, trainer_of: Callable[..., Trainer]
) -> None:
    objective, wanted = case.partition("_")[0], GOLDEN["cases"][case]
    sides = ("chosen",) if objective == "kto" else ("chosen", "rejected")
    rows = [as_sample(row, sides) for row in golden.samples_of(case)]
    policy, reference = golden.seeds_of(case)
    has_reference = objective in ("dpo", "ipo", "kto")
    trainer = trainer_of(
        objective,
        rows,
        model=golden.make_model(reference if has_reference else policy, reward=objective == "reward"),
        train={"micro_batch_size": micro_batch_size},
        preference={**golden.CASES[case], **({"reference": "model"} if has_reference else {})},
    )
    trainer.start_objective()  # the reference is what the model is now; then it becomes the policy
    if has_reference:
        trainer.model.load_state_dict(golden.make_model(policy).state_dict())
    loss, norms, metrics = gradients_of_step(trainer)
    assert loss == pytest.approx(wanted["loss"], rel=2e-6)
    assert norms.keys() == wanted["gradient_norms"].keys()
    for name, norm in wanted["gradient_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=2e-5), name
    assert_metrics(objective, metrics, wanted["metrics"], golden.CASES[case])


def assert_metrics(
    objective: str, found: dict[str, float], trl: dict[str, float], settings: dict[str, Any]
) -> None:
    """What is called alike is alike. IPO and ORPO report margins of their own; KTO's accuracy has no peer."""
    close = {"rel": 2e-5, "abs": 1e-6}
    if objective in ("dpo", "simpo"):
        assert found["margin"] == pytest.approx(trl["rewards/margins"], **close)
    if objective in ("dpo", "simpo", "kto"):
        assert found["chosen_reward"] == pytest.approx(trl["rewards/chosen"], **close)
        assert found["rejected_reward"] == pytest.approx(trl["rewards/rejected"], **close)
    if objective in ("dpo", "simpo", "orpo"):
        assert found["accuracy"] == pytest.approx(trl["rewards/accuracies"], **close)
    if objective in ("dpo", "ipo"):
        assert found["chosen_logprob"] == pytest.approx(trl["logps/chosen"], **close)
        assert found["rejected_logprob"] == pytest.approx(trl["logps/rejected"], **close)
    if objective == "kto":
        assert trl["kl"] > 0.1, "a baseline cut off at zero would prove nothing"
        assert found["baseline"] == pytest.approx(settings["beta"] * trl["kl"], **close)
    if objective == "reward":
        assert found["accuracy"] == pytest.approx(trl["accuracy"], **close)
        assert found["margin"] == pytest.approx(trl["margin"], **close)


def test_the_golden_numbers_say_where_they_come_from() -> None:
    assert GOLDEN["versions"]["trl"] == "1.16.0"
    assert "make_golden.py" in GOLDEN["command"]
    assert all(torch.isfinite(torch.tensor(case["loss"])) for case in GOLDEN["cases"].values())
