"""Sweeps as they are written: what is understood, and what is refused and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hearth.config import Recipe, load_settings
from hearth.config.sweep import SweepSection, check_sweep, recipe_with, sweep_identity
from hearth.errors import ConfigError


def section(parameters: dict[str, Any], **others: Any) -> SweepSection:
    return SweepSection.model_validate({"parameters": parameters, **others})


def load(tmp_path: Path, text: str) -> SweepSection:
    (tmp_path / "sweep.yaml").write_text(text)
    return load_settings(SweepSection, tmp_path / "sweep.yaml", environ={}).settings


def test_a_file(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        "parameters:\n  train.learning_rate: {log: [1e-4, 1e-2]}\n"
        "  train.warmup_steps: {int: [0, 10], step: 5}\n"
        "  train.schedule: {choice: [cosine, wsd]}\ntrials: 7\nmetric: loss\npruner: median\n",
    )
    assert found.parameters["train.learning_rate"].range() == (1e-4, 1e-2)
    assert found.parameters["train.warmup_steps"].grid() == [0, 5, 10]
    assert [parameter.kind for parameter in found.parameters.values()] == ["log", "int", "choice"]
    assert (found.trials, found.metric, found.direction) == (7, "loss", "minimize")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{log: [1e-2, 1e-4]}", r"sweep\.yaml: parameters\.train\.steps: log runs from 0\.01 to 0\.0001"),
        ("{int: [5, 5]}", "the first must be less"),
        ("{log: [0, 1]}", "log needs numbers above 0, not 0.0"),
        ("{log: [1, 2], int: [1, 2]}", "give one of log, uniform, int, choice, not log and int"),
        ("{}", "give one of log, uniform, int, choice"),
        ("{choice: []}", "choice needs values"),
        ("{choice: [1, 1]}", "each once"),
        ("{int: [1, 3], step: 4}", r"step 4\.0 does not fit int \[1, 3\]"),
        ("{int: [1, 3], step: 0.5}", "is none"),
        ("{lgo: [1, 2]}", "unknown key"),
        ("{int: [1.5, 2]}", "is not a whole number"),
        ("{uniform: [1]}", r"train\.steps\.uniform"),
    ],
)
def test_ranges_that_cannot_be(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(tmp_path, f"parameters:\n  train.steps: {text}\n")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("trials: 3\n", "parameters: is missing"),
        ("parameters: {}\n", "parameters is empty"),
        ("parameters: {train.steps: {int: [1, 2]}}\nsampler: tpee\n", "'tpee' is not allowed; use 'tpe'"),
        ("parameters: {train.steps: {int: [1, 2]}}\ntrails: 3\n", "did you mean trials"),
        (
            "parameters: {train.learning_rate: {log: [1, 2]}}\nsampler: grid\n",
            "give train.learning_rate a choice",
        ),
        ("parameters: {train.steps: {int: [1, 2]}}\nname: ../x\n", "may have letters"),
    ],
)
def test_sweeps_that_cannot_be(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("key", "values", "match"),
    [
        ("train.learning_rat", [1.0], r"has no such key; did you mean train\.learning_rate\?"),
        ("learning_rate", [1.0], r"did you mean train\.learning_rate\?"),
        ("train.lr", [1.0], r"did you mean train\.learning_rate\?"),
        ("train", [1.0], "has no such key"),
        ("track.name", ["x"], "track is the same for all trials"),
        ("register.name", ["x"], "register is the same for all trials"),
        ("train.steps", [4, 5.5], r"5\.5 cannot be used: train\.steps: 5\.5 is not a whole number"),
        ("train.warmup_steps", [1, 900], "900 cannot be used: .*more than steps"),
        ("model.adapter.rank", [4], r"the recipe has no model\.adapter"),
    ],
)
def test_keys_that_the_recipe_refuses(key: str, values: list[Any], match: str) -> None:
    recipe = Recipe.model_validate({"train": {"steps": 100}})
    with pytest.raises(ConfigError, match=match):
        check_sweep(section({key: {"choice": values}}), recipe)


def test_a_pruner_needs_evaluations() -> None:
    made = section({"train.learning_rate": {"log": [1e-4, 1e-2]}}, pruner="median")
    with pytest.raises(ConfigError, match=r"sweep\.pruner median has nothing to go by"):
        check_sweep(made, Recipe())
    check_sweep(made, Recipe.model_validate({"train": {"evaluate_every": 5}}))


def test_values_go_into_the_recipe() -> None:
    recipe = Recipe.model_validate({"model": {"config": {"model_type": "gpt2", "n_layer": 2}}})
    found = recipe_with(
        recipe, {"train.learning_rate": 0.5, "model.config.n_layer": 4, "model.config.n_embd": 8}
    )
    assert found.train.learning_rate == 0.5
    assert found.model.config == {"model_type": "gpt2", "n_layer": 4, "n_embd": 8}
    assert recipe.train.learning_rate != 0.5
    assert recipe_with(recipe, {}) == recipe


def test_the_grid_and_the_identity() -> None:
    made = section(
        {"train.learning_rate": {"uniform": [0.1, 0.3], "step": 0.1}, "train.seed": {"choice": [1, 2]}},
        sampler="grid",
    )
    combinations = [(lr, seed) for lr in (0.1, 0.2, 0.3) for seed in (1, 2)]  # 0.1 + 2 * 0.1 is no 0.3
    assert [tuple(values.values()) for values in made.grid()] == combinations
    identity = sweep_identity(made, Recipe())
    more = made.model_copy(update={"trials": 99, "parallel": 4, "timeout": 5.0, "name": "x"})
    assert sweep_identity(more, Recipe()) == identity
    assert sweep_identity(made.model_copy(update={"metric": "loss"}), Recipe()) != identity
    assert sweep_identity(made, Recipe.model_validate({"train": {"seed": 3}})) != identity
