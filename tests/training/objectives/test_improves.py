"""What preference objectives are for: held-out pairs that people have compared come into the right order.

A small model is pretrained on other dialogues; every objective starts from it, learns from hh-rlhf pairs, and
is measured on pairs that the data pipeline holds out, by one measure for all: how often the answer that
people prefer has become likelier than the other one, both against the model before (a reward model: has the
higher score). Chance is one half. Of the 519 pairs (548 for the reward model, whose tokenizer is another) its
standard error is 0.022: 0.54 is 1.8 of them above it, and what is reached where this was written, 0.563 to
0.592, leaves room for other processors' rounding. Rates, steps and bases were chosen among a few with these
very pairs held out, so that a share is no estimate of what an objective reaches elsewhere.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.config import Recipe
from hearth.training import Trainer
from hearth.training.objectives import dpo
from hearth.training.objectives.dpo import dpo_losses
from hearth.workspace import Workspace

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.slow

THRESHOLD = 0.54
# Learning rate, steps, pairs (answers of kto) a step, what train.preference says.
SETTINGS: dict[str, tuple[float, int, int, dict[str, float]]] = {
    "dpo": (4e-4, 24, 32, {"beta": 0.1}),
    "ipo": (6e-4, 24, 32, {"beta": 2.0}),
    "kto": (2e-4, 20, 64, {"beta": 0.1}),
    "orpo": (1e-3, 36, 32, {"odds_weight": 20.0}),
    "simpo": (6e-4, 24, 32, {"beta": 2.0, "gamma": 0.5}),
}


def messages_of(dialogue: str) -> list[dict[str, str]]:
    """Turns of "Human: … Assistant: …"."""
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", dialogue)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": text.strip()}
        for name, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    with Workspace.open(tmp_path_factory.mktemp("workspace")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pairs(shared_data: Path) -> Path:
    path = shared_data / "hh_rlhf" / "harmless-base-test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def pretrained(source: dict[str, Any], workspace: Workspace) -> Path:
    """200 thousand weights after 120 steps."""
    recipe = Recipe.model_validate(
        {
            "model": {"size": "200K", "context_length": 256},
            "tokenizer": {"vocab_size": 1024},
            "data": {"sources": [source], "sequence_length": 256, "truncate": True, "num_workers": 1},
            "train": {
                "objective": "pretrain",
                "steps": 120,
                "batch_size": 8,
                "micro_batch_size": 8,
                "learning_rate": 4e-3,
                "warmup_steps": 20,
                "precision": "fp32",
            },
        }
    )
    torch.set_num_threads(1)
    trainer = Trainer.from_recipe(recipe, workspace=workspace, progress=False, device="cpu")
    return Path(trainer.fit().summary["model_dir"])


@pytest.fixture(scope="module")
def base(shared_data: Path, workspace: Workspace) -> Path:
    """Has read other dialogues, and none of the pairs."""
    path = shared_data / "dolly_hhrlhf_small" / "dolly_hhrlhf_train_small.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    source = {"path": str(path), "format": "chat", "prompt_field": "prompt", "response_field": "response"}
    return pretrained(source, workspace)


@pytest.fixture(scope="module")
def base_of_rewards(pairs: Path, workspace: Workspace) -> Path:
    """Has read both dialogues of all pairs, and favours none: rewards do better on it, the others worse."""
    dialogues = workspace.root / "dialogues.jsonl"
    with gzip.open(pairs, "rt", encoding="utf-8") as rows, dialogues.open("w", encoding="utf-8") as file:
        for row in map(json.loads, rows):
            for side in ("chosen", "rejected"):
                file.write(json.dumps({"messages": messages_of(row[side])}) + "\n")
    return pretrained({"path": str(dialogues), "format": "chat"}, workspace)


def recipe_of(objective: str, preference: dict[str, Any], base: Path, pairs: Path, **train: Any) -> Recipe:
    settings = {"warmup_steps": 4, "weight_decay": 0.0, "micro_batch_size": 16, "precision": "fp32"}
    return Recipe.model_validate(
        {
            "model": {"base": str(base)},
            "data": {
                "sources": [{"path": str(pairs), "format": "preference"}],
                "sequence_length": 128,
                "truncate": True,
                "validation_fraction": 0.3,
                "num_workers": 1,
                "seed": 1,
            },
            "train": {"objective": objective, "preference": preference, **settings, **train},
        }
    )


@pytest.fixture(scope="module")
def judge(base: Path, pairs: Path, workspace: Workspace) -> Trainer:
    """Knows how likely the model before finds all held-out answers; its own training does not matter."""
    train = {"steps": 1, "batch_size": 16, "warmup_steps": 0}
    recipe = recipe_of("dpo", {"reference": "precompute"}, base, pairs, **train)
    torch.set_num_threads(1)
    trainer = Trainer.from_recipe(recipe, workspace=workspace, progress=False, device="cpu")
    trainer.start_objective()
    assert trainer.eval_rows is not None
    assert len(trainer.eval_rows) >= 500
    return trainer


@pytest.fixture
def share_in_order(base: Path, pairs: Path, judge: Trainer, workspace: Workspace) -> Callable[[str], float]:
    """Trains with an objective; the share of held-out pairs that are in the right order afterwards."""

    def run(objective: str) -> float:
        rate, steps, batch_size, preference = SETTINGS[objective]
        train = {"learning_rate": rate, "steps": steps, "batch_size": batch_size, "evaluate_rows": 16}
        recipe = recipe_of(objective, preference, base, pairs, **train)
        trainer = Trainer.from_recipe(recipe, workspace=workspace, progress=False, device="cpu")
        trainer.fit()
        judge.model.load_state_dict(trainer.model.state_dict())
        found = judge.evaluate()["eval_accuracy"]
        logger.info("%s: %.3f of held-out pairs are in the right order", objective, found)
        return found

    return run


@pytest.mark.parametrize("objective", SETTINGS)
def test_held_out_pairs_come_into_the_right_order(objective: str, share_in_order: Any) -> None:
    assert share_in_order(objective) >= THRESHOLD


def test_with_a_wrong_sign_they_come_into_the_wrong_order(
    share_in_order: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo, "dpo_losses", lambda margins_P, smoothing: dpo_losses(-margins_P, smoothing))
    assert share_in_order("dpo") < 0.49  # 0.474 where this was written


def test_rewards_put_held_out_pairs_into_the_right_order(
    base_of_rewards: Path, pairs: Path, workspace: Workspace
) -> None:
    train = {"learning_rate": 1e-3, "steps": 60, "batch_size": 32}
    recipe = recipe_of("reward", {}, base_of_rewards, pairs, **train)
    trainer = Trainer.from_recipe(recipe, workspace=workspace, progress=False, device="cpu")
    found = trainer.fit().metrics("eval_accuracy")[-1].value
    logger.info("reward: %.3f of held-out pairs are in the right order", found)
    assert found >= THRESHOLD
