"""Fine-tuning and distillation against TRL; make_golden_tokens.py made the numbers and says how."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hearth.training import Trainer
from hearth.training.objectives.distill import Distillation
from hearth.training.teacher import Teacher
from hearth.training.totals import add_up

GOLDEN = json.loads(Path(__file__).with_name("trl_tokens.json").read_text(encoding="utf-8"))


@pytest.fixture
def rows(golden: ModuleType, pack: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """The six better answers, two in a packed row."""
    samples = golden.make_samples()
    documents = [sample["prompt"] + sample["chosen"] for sample in samples]
    masks = [
        [at >= len(s["prompt"]) for at in range(len(d))] for s, d in zip(samples, documents, strict=True)
    ]
    return [pack(documents[at : at + 2], 32, masks[at : at + 2]) for at in range(0, len(documents), 2)]


def assert_step(trainer: Trainer, wanted: dict[str, Any], *, factor: float = 1.0) -> None:
    trainer.start_objective()
    batches = trainer.objective.batches(trainer, 0, trainer.step_rows(0))
    expected = add_up(trainer.objective.counts(batch) for batch in batches)
    loss, _ = trainer._accumulate(batches, expected)
    assert float(loss) == pytest.approx(factor * wanted["loss"], rel=2e-6)
    norms = {name: float(w.grad.norm()) for name, w in trainer.model.named_parameters() if w.grad is not None}
    assert norms.keys() == wanted["gradient_norms"].keys()
    for name, norm in wanted["gradient_norms"].items():
        assert norms[name] == pytest.approx(factor * norm, rel=2e-5), name


@pytest.mark.parametrize("micro_batch_size", [3, 1])
def test_fine_tuning_is_that_of_trl(
    rows: list[dict[str, Any]], trainer_of: Callable[..., Trainer], micro_batch_size: int
) -> None:
    assert_step(trainer_of("sft", rows, train={"micro_batch_size": micro_batch_size}), GOLDEN["sft"])


@pytest.mark.parametrize("micro_batch_size", [3, 1])
@pytest.mark.parametrize("divergence", GOLDEN["distill"])
def test_distillation_is_that_of_trl(
    rows: list[dict[str, Any]],
    golden: ModuleType,
    trainer_of: Callable[..., Trainer],
    divergence: str,
    micro_batch_size: int,
) -> None:
    wanted = GOLDEN["distill"][divergence]
    distill = {"divergence": divergence, "temperature": wanted["temperature"], "weight": 1.0}
    if divergence == "jsd":
        distill["jsd_beta"] = wanted["beta"]
    trainer = trainer_of("distill", rows, train={"micro_batch_size": micro_batch_size, "distill": distill})
    assert isinstance(trainer.objective, Distillation)
    trainer.objective.teacher = Teacher(golden.make_model(1))
    assert_step(trainer, wanted, factor=wanted["temperature"] ** 2)
