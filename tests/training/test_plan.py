"""The estimate of memory beside what a step really takes; what a plan says of documents that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.config import Recipe
from hearth.config.recipe import TrainSection
from hearth.errors import ConfigError, DataError
from hearth.models.building import model_from_config
from hearth.models.sizes import config_for_size
from hearth.training import Trainer
from hearth.training.activation import checkpoint_activations
from hearth.training.batches import Batch
from hearth.training.loss import token_loss_sum
from hearth.training.objectives import make_objective
from hearth.training.optimizers import build_optimizer, state_bytes
from hearth.training.peak_memory import peak_bytes
from hearth.training.plan import _WORKSPACE, estimate_memory
from hearth.training.precision import autocast

CPU = torch.device("cpu")
MakeTrainer = Callable[..., Trainer]


def measured(model: Any, precision: str, num_rows: int, length: int) -> int:
    """Peak of the second micro-batch of a step, with weights and gradients."""
    ids = torch.randint(0, 320, (num_rows, length))
    labels, positions = ids.roll(-1, 1), torch.arange(length)[None].repeat(num_rows, 1)
    batch = Batch(
        ids, labels, positions, torch.zeros_like(ids), num_valid=ids.numel(), num_tokens=ids.numel()
    )

    def work() -> None:
        with autocast(precision, CPU):
            loss, _ = token_loss_sum(model, batch)
        loss.backward()

    work()
    return peak_bytes(work, CPU) + 2 * sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_within_a_third_of_what_a_step_takes(precision: str, checkpointing: str) -> None:
    model = model_from_config(config_for_size("1M", "qwen3", 320, 256), seed=0).train()
    checkpoint_activations(model, checkpointing)
    estimate = estimate_memory(
        model,
        micro_batch_size=2,
        sequence_length=256,
        precision=precision,
        optimizer_bytes=0,
        checkpointing=checkpointing,
    )
    assert estimate - _WORKSPACE == pytest.approx(measured(model, precision, 2, 256), rel=0.33)


def test_optimizer_and_average_count() -> None:
    model = model_from_config(config_for_size("100K", "qwen3", 320, 64), seed=0)
    trainable = sum(weight.numel() for weight in model.parameters())
    keys = {"micro_batch_size": 1, "sequence_length": 8, "precision": "fp32"}
    adamw = state_bytes(build_optimizer(model, TrainSection()))
    base = estimate_memory(model, **keys, optimizer_bytes=0)
    assert estimate_memory(model, **keys, optimizer_bytes=adamw) - base == adamw
    assert adamw == pytest.approx(8 * trainable, rel=0.01)
    assert estimate_memory(model, **keys, optimizer_bytes=0, averaged=True) - base == 4 * trainable


def answers_of(folder: Path, lengths: list[int]) -> dict[str, Any]:
    """A data section of questions whose answers have so many words."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": "dog " * n},
            ]
        }
        for number, n in enumerate(lengths)
    ]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "sources": [{"path": str(folder / "answers.jsonl"), "format": "chat"}],
        "sequence_length": 48,
        "validation_fraction": 0.0,
    }


def test_what_is_too_long_for_a_row_is_told(
    train_parts: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = answers_of(tmp_path, [2] * 20 + [60] * 7)
    train = {"objective": "sft", "steps": 2}
    plan = train_parts(data=data, train=train).plan()
    assert (plan.num_dropped, plan.num_truncated) == (7, 0)
    cut = train_parts(data={**data, "truncate": True}, train=train).plan()
    assert (cut.num_dropped, cut.num_truncated) == (0, 7)
    train_parts(data=data, train=train).fit()
    assert "7 documents are left out, too long for data.sequence_length 48" in capsys.readouterr().err


def test_evaluations_of_nothing_are_told(
    train_parts: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"steps": 2, "evaluate_every": 1, "early_stopping_patience": 1}
    train_parts(data={"validation_fraction": 0.0}, train=train).fit()
    assert "nothing is held out" in capsys.readouterr().err


def test_a_corpus_that_is_all_too_long_says_what_to_do(train_parts: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"all 9 conversations are longer than data\.sequence_length 48"
    ) as caught:
        train_parts(data=answers_of(tmp_path, [60] * 9), train={"objective": "sft"})
    assert "data.truncate" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("objective", "section", "refused"),
    [
        ("sft", {"preference": {"beta": 2.0}}, "preference"),
        ("pretrain", {"distill": {"teacher": "x"}}, "distill"),
        ("dpo", {"reinforce": {"num_generations": 4}}, "reinforce"),
        ("grpo", {"preference": {"gamma": 1.0}}, "preference"),
        ("distill", {"preference": {"gamma": 1.0}}, "preference"),
    ],
)
def test_a_section_for_other_objectives_is_refused(
    objective: str, section: dict[str, Any], refused: str
) -> None:
    config = Recipe.model_validate({"train": {"objective": objective, **section}})
    with pytest.raises(ConfigError, match=rf"train\.{refused} is given, but the objective {objective}"):
        make_objective(config)
