"""The loss and gradients of a step are the same however its micro-batches are shared out.

Ranks are simulated: each has a copy of the model and some of the micro-batches, knows the counts of the whole
step, and what they find is added up, which is what a sum over processes does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from hearth.training import Trainer
from hearth.training.samples import Sample
from hearth.training.teacher import Teacher
from hearth.training.totals import LossTotals, add_up, as_losses

PAIRS = ("dpo", "ipo", "orpo", "simpo", "reward")
TOKENS = ("pretrain", "sft", "distill")


@pytest.fixture
def made(
    trainer_of: Callable[..., Trainer],
    samples: Callable[..., list[Sample]],
    golden: ModuleType,
    documents: list[list[int]],
    rows_of: Callable[..., list[dict[str, Any]]],
) -> Callable[[str], Trainer]:
    def make(objective: str) -> Trainer:
        if objective in TOKENS:
            train: dict[str, Any] = {"micro_batch_size": 1, "distill": {}}
            trainer = trainer_of(
                objective, rows_of([[3 + t % 40 for t in d] for d in documents], 64, 2)[:6], train=train
            )
            if objective == "distill":
                objective_of: Any = trainer.objective
                objective_of.teacher = Teacher(golden.make_model(1))
        else:
            rows = samples(6, num_parts=2 if objective in PAIRS else 1)
            preference = {"reference": "model"} if objective in ("dpo", "ipo", "kto") else {}
            trainer = trainer_of(objective, rows, train={"micro_batch_size": 1}, preference=preference)
        trainer.start_objective()
        with torch.no_grad():  # away from the reference
            for weight in trainer.model.parameters():
                weight.mul_(1.1)
        return trainer

    return make


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("objective", [*TOKENS, *PAIRS, "kto"])
def test_shared_out_it_is_the_same_step(
    made: Callable[[str], Trainer], objective: str, num_ranks: int
) -> None:
    trainer = made(objective)
    batches = trainer.objective.batches(trainer, 0, trainer.step_rows(0))
    expected = add_up(trainer.objective.counts(batch) for batch in batches)
    models = [copy.deepcopy(trainer.model) for _ in range(num_ranks)]
    loss, _ = trainer._accumulate(batches, expected)
    parts = []
    for rank, model in enumerate(models):
        model.train()
        totals = LossTotals(trainer.device)
        for batch in batches[rank::num_ranks]:
            part = totals.add(as_losses(trainer.compute_loss(model, batch)), expected)
            parts.append(part.detach())
            part.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(torch.stack(parts).sum(), loss, rtol=1e-9, atol=1e-12, check_dtype=False)
    for name, weight in trainer.model.named_parameters():
        found = [dict(model.named_parameters())[name].grad for model in models]
        total = sum(gradient for gradient in found if gradient is not None)
        torch.testing.assert_close(total, weight.grad, rtol=1e-9, atol=1e-12)
