"""What reinforcement learning is for: answers get better. Tiny models, fixed seeds, one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hearth.config import Recipe
from hearth.training import Trainer
from hearth.training.samples import Sample

pytestmark = pytest.mark.slow

Make = Callable[..., Any]


def sums(tokenizer: PreTrainedTokenizerFast) -> list[Sample]:
    """All sums of two numbers below three, as prompts: "1+2=" with the answer 3."""
    found = []
    for a in range(3):
        for b in range(3):
            tokens = np.asarray(tokenizer.encode(f"{a}+{b}="), np.int64)
            part = (tokens, np.zeros(len(tokens), np.bool_))
            found.append(Sample((part,), fields={"answer": str(a + b)}))
    return found


def taught_to_answer(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The model after a little SFT on sums with *random* digits: it answers with a digit and stops."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(256):
        a, b, digit = rng.integers(0, 3), rng.integers(0, 3), rng.integers(0, 10)
        ids = np.asarray([*tokenizer.encode(f"{a}+{b}={digit}"), tokenizer.eos_token_id], np.int64)
        mask = np.arange(len(ids)) >= 4
        length = len(ids) - 1
        rows.append(
            {
                "input_ids": ids[:-1],
                "labels": np.where(mask[1:], ids[1:], -100),
                "position_ids": np.arange(length),
                "segment_ids": np.zeros(length, np.int64),
            }
        )
    train = {
        "objective": "sft",
        "steps": 60,
        "batch_size": 32,
        "micro_batch_size": 32,
        "learning_rate": 3e-3,
        "precision": "fp32",
    }
    trainer = Trainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows,
        config=Recipe.model_validate({"train": train, "data": {"sequence_length": 5}}),
        progress=False,
        device="cpu",
    )
    for step in range(60):
        trainer.train_step(step)
    return model


def calmed(model: Any) -> Any:
    """With an ordinary start, not a lively one."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.div_(4.0)
    return model


def learn(trainer: Trainer) -> list[dict[str, float]]:
    return [dict(trainer.train_step(step).metrics) for step in range(trainer.total_steps)]


def test_grpo_learns_to_add(trainer_of: Make, policy: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = calmed(policy(hidden_size=64, intermediate_size=128))
    rows = sums(tokenizer)
    trainer = trainer_of(
        "grpo",
        rows,
        model=taught_to_answer(model, tokenizer),
        train={
            "steps": 120,
            "batch_size": 9,
            "micro_batch_size": 9,
            "learning_rate": 1e-3,
            "schedule": "constant",
        },
        reinforce={
            "rewards": [{"name": "exact_answer"}],
            "num_generations": 32,
            "max_new_tokens": 2,
            "clip_high": 0.28,
            "iterations": 2,
        },
        eval_dataset=rows,
    )
    before = trainer.evaluate()["eval_reward"]
    metrics = learn(trainer)
    after = trainer.evaluate()["eval_reward"]
    assert before < 0.2, "random digits are right one time in ten"
    assert after > 0.8
    assert max(step["engine_mismatch"] for step in metrics) < 1e-3
    assert metrics[-1]["entropy"] < metrics[0]["entropy"]


def test_ppo_learns_to_repeat_a_letter(trainer_of: Make, policy: Make, prompts: Make) -> None:
    rows = prompts(8)
    model = calmed(policy())
    trainer = trainer_of(
        "ppo",
        rows,
        model=model,
        train={
            "steps": 120,
            "batch_size": 8,
            "micro_batch_size": 8,
            "learning_rate": 5e-3,
            "schedule": "constant",
        },
        reinforce={
            "rewards": [{"name": "exact_answer"}],
            "num_generations": 16,
            "max_new_tokens": 1,
            "iterations": 2,
        },
        eval_dataset=rows,
    )
    before = trainer.evaluate()["eval_reward"]
    metrics = learn(trainer)
    after = trainer.evaluate()["eval_reward"]
    assert before < 0.15, "one of thirty characters"
    assert after > 0.8
    assert metrics[0]["value"] == 0.0
    assert metrics[-1]["value"] == pytest.approx(metrics[-1]["reward"], abs=0.3), "the head has learnt, too"
