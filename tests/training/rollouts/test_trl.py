"""GRPO's loss, gradients and metrics against TRL's own trainer; make_golden.py made the numbers."""

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
from hearth.training.logprobs import token_logprobs
from hearth.training.objectives.reinforce import ENGINE, OLD, REFERENCE
from hearth.training.rollouts.batching import Rollouts, label_order
from hearth.training.samples import Sample
from hearth.training.totals import add_up

GOLDEN = json.loads(Path(__file__).with_name("trl.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def golden(script: Callable[[Path], ModuleType]) -> ModuleType:
    """The script that made the golden numbers: its models and answers."""
    return script(Path(__file__).with_name("make_golden.py"))


def rollouts_of(golden: ModuleType, trainer: Trainer) -> Rollouts:
    """The given answers, with what the old and the reference weights say of them."""
    rows = golden.make_answers()
    found = Rollouts.of(range(len(rows)), [r["prompt"] for r in rows], [r["answers"] for r in rows])
    for name, weights in ((OLD, golden.OLD), (REFERENCE, golden.REFERENCE)):
        model, parts = golden.make_model(*weights), []
        for batch in found.batches(2):
            with torch.no_grad():
                temperature = trainer.config.train.reinforce.temperature
                logp_N = token_logprobs(model, batch, temperature=temperature)[0]
            parts.append(logp_N[label_order(batch)])
        found.values[name] = torch.cat(parts)
    found.values[ENGINE] = torch.zeros_like(found.values[OLD])
    trainer.objective.judge(found, torch.tensor([r for row in rows for r in row["rewards"]]).double())
    return found


@pytest.mark.parametrize("case", GOLDEN["cases"])
@pytest.mark.parametrize("prompts_at_once", [4, 1])
def test_loss_and_gradients_are_those_of_trl(
    case: str, prompts_at_once: int, golden: ModuleType, trainer_of: Callable[..., Trainer]
) -> None:
    wanted = GOLDEN["cases"][case]
    rows = [
        Sample(((np.asarray(r["prompt"]), np.zeros(len(r["prompt"]), bool)),)) for r in golden.make_answers()
    ]
    settings: dict[str, Any] = {"num_generations": golden.GROUP, **golden.CASES[case]}
    trainer = trainer_of("grpo", rows, model=golden.make_model(*golden.POLICY), reinforce=settings)
    rollouts = rollouts_of(golden, trainer)
    batches = list(rollouts.batches(prompts_at_once))
    loss, metrics = trainer._accumulate(batches, add_up(trainer.objective.counts(b) for b in batches))
    # TRL computes entropies and, for its own precision, some sums in float32.
    assert float(loss) == pytest.approx(wanted["loss"], rel=2e-6, abs=1e-8)
    norms = {name: float(w.grad.norm()) for name, w in trainer.model.named_parameters()}
    assert norms == pytest.approx(wanted["gradient_norms"], rel=2e-5)
    assert metrics["entropy"] == pytest.approx(wanted["metrics"]["entropy"], rel=1e-5)
    assert metrics["clip_share"] == pytest.approx(wanted["metrics"]["clip_ratio/region_mean"], rel=1e-5)
    if "kl_weight" in settings:
        assert metrics["kl"] == pytest.approx(wanted["metrics"]["kl"], rel=1e-5)


def test_the_golden_numbers_prove_something() -> None:
    assert GOLDEN["versions"]["trl"] == "1.16.0"
    assert "make_golden.py" in GOLDEN["command"]
    cases = GOLDEN["cases"]
    assert len({round(case["loss"], 9) for case in cases.values()}) == len(cases)
    assert all(0.05 < case["metrics"]["clip_ratio/region_mean"] < 0.95 for case in cases.values())
