"""Layouts in which an objective cannot see what it needs are refused before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from hearth.config import Recipe
from hearth.errors import ConfigError
from hearth.training.objectives import make_objective

REWARDS = {"rewards": [{"name": "contains", "options": {"field": "answer"}}], "max_new_tokens": 4}
SAMPLES = ("dpo", "ipo", "kto", "orpo", "simpo", "reward", "grpo", "ppo")


def recipe_of(objective: str, parallel: dict[str, Any]) -> Recipe:
    train: dict[str, Any] = {"objective": objective}
    if objective in ("grpo", "ppo"):
        train["reinforce"] = REWARDS
    if objective == "distill":
        train["distill"] = {"teacher": "somewhere"}
    return Recipe.model_validate({"train": train, "data": {"sequence_length": 32}, "parallel": parallel})


@pytest.mark.parametrize("objective", [*SAMPLES, "distill"])
def test_positions_of_whole_sequences(objective: str) -> None:
    recipe = recipe_of(objective, {"context": 2})
    with pytest.raises(ConfigError, match=f"parallel.context is 2, but {objective}") as caught:
        make_objective(recipe).check([])
    assert "parallel.shard" in str(caught.value.fix)
    for allowed in ({"data": 2}, {"shard": 2}, {"tensor": 2}):
        make_objective(recipe_of(objective, allowed)).check([])


@pytest.mark.parametrize("objective", ["dpo", "ipo", "kto"])
def test_a_pipeline_has_no_whole_reference(objective: str) -> None:
    train = {"objective": objective, "preference": {"reference": "model"}}
    recipe = Recipe.model_validate({"train": train, "parallel": {"pipeline": 2}})
    with pytest.raises(ConfigError, match=r"reference is model, but parallel\.pipeline is 2"):
        make_objective(recipe).check([])
    make_objective(recipe_of(objective, {"pipeline": 2})).check([])


def test_no_stage_has_the_head_of_a_reward_model() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.pipeline is 2, but reward"):
        make_objective(recipe_of("reward", {"pipeline": 2})).check([])


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_rollouts_need_the_whole_model(objective: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel.pipeline is 2, but {objective}"):
        make_objective(recipe_of(objective, {"pipeline": 2})).check([])
