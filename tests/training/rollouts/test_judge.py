"""A learned reward model as the reward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.errors import ConfigError, ModelError, NotFoundError
from hearth.models.reward_head import with_reward_head
from hearth.training.rollouts.answers import Answer
from hearth.training.rollouts.judge import RewardModelJudge

Make = Callable[..., Any]


@pytest.fixture
def judge_dir(tmp_path: Path, policy: Make, tokenizer: Any) -> Path:
    model = with_reward_head(policy(7))
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    return tmp_path / "judge"


def test_scores_are_those_of_the_model_itself(judge_dir: Path, trainer_of: Make, prompts: Make) -> None:
    from transformers import AutoModelForSequenceClassification

    judge = RewardModelJudge(trainer_of("grpo", prompts(2)), str(judge_dir), {})
    generator = torch.Generator().manual_seed(2)
    answers = []
    for number in range(40):
        ids = torch.randint(3, 20, (3 + number % 7,), generator=generator).tolist()
        answers.append(Answer("", "", tuple(ids[:2]), (*ids[2:], 1)))
    found = judge(answers)
    model = AutoModelForSequenceClassification.from_pretrained(judge_dir)
    with torch.no_grad():
        for answer, score in zip(answers, found, strict=True):
            ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
            assert score == pytest.approx(float(model(ids).logits[0, 0]), rel=1e-4, abs=1e-5)


def test_grpo_follows_a_reward_model(judge_dir: Path, trainer_of: Make, prompts: Make) -> None:
    rewards = [{"model": str(judge_dir), "weight": 0.5}, {"name": "length", "options": {"target": 2}}]
    trainer = trainer_of("grpo", prompts(2), reinforce={"rewards": rewards})
    metrics = trainer.train_step(0).metrics
    assert metrics["reward_model_std"] > 0
    assert metrics["reward"] == pytest.approx(0.5 * metrics["reward_model"] + metrics["reward_length"])


def test_what_is_no_fitting_reward_model_is_refused(
    judge_dir: Path, trainer_of: Make, prompts: Make, policy: Make, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = trainer_of("grpo", prompts(2))
    with pytest.raises((ModelError, NotFoundError)):
        RewardModelJudge(trainer, str(tmp_path / "nowhere"), {})
    with pytest.raises(ConfigError, match="takes no options"):
        RewardModelJudge(trainer, str(judge_dir), {"field": "x"})
    policy().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    with pytest.raises(ModelError, match="is no reward model"):
        RewardModelJudge(trainer, str(tmp_path / "policy"), {})
    long = trainer_of("grpo", prompts(2), sections={"data": {"sequence_length": 65}})
    with pytest.raises(ConfigError, match="reads at most 64 tokens"):
        RewardModelJudge(long, str(judge_dir), {})
    tokenizer_file = judge_dir / "tokenizer.json"
    tokenizer_file.write_text(tokenizer_file.read_text().replace('"h":', '"z":'))
    with pytest.raises(ConfigError, match="has another tokenizer"):
        RewardModelJudge(trainer, str(judge_dir), {})
