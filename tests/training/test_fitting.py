"""A run that cannot fit is refused before anything is prepared; one that could is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hearth.config import Recipe
from hearth.errors import ConfigError, DataError
from hearth.parallel.planner import Plan, facts_of_recipe, job_of_recipe, memory_of
from hearth.parallel.world import World
from hearth.training import Trainer, fitting
from hearth.workspace import Workspace

CPU = torch.device("cpu")


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    base = {
        "model": {"size": "5M", "context_length": 256},
        "data": {"sources": [{"path": "nowhere.txt"}], "sequence_length": 256},
        "tokenizer": {"vocab_size": 4096},
        "train": {"batch_size": 8, "micro_batch_size": 8, "precision": "fp32"},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    return Recipe.model_validate(merged)


def needed(recipe: Recipe) -> Any:
    job = job_of_recipe(recipe, precision="fp32")
    return memory_of(facts_of_recipe(recipe), job, Plan.of(recipe.parallel, 1), device="cpu")


@pytest.fixture
def workspace(tmp_path: Path) -> Any:
    with Workspace.open(tmp_path / "workspace") as opened:
        yield opened


def check(recipe: Recipe, workspace: Workspace, memory: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "whole_host_memory", lambda: round(memory))
    fitting.refuse_what_cannot_fit(recipe, World.alone(CPU), workspace=workspace)


def test_refused_only_where_no_error_explains_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of()
    memory = needed(recipe)
    check(recipe, workspace, 1.01 * memory.total, monkeypatch)
    assert capsys.readouterr().err == ""
    check(recipe, workspace, memory.tensors, monkeypatch)
    assert "this run may not fit: a process needs about" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="this run does not fit") as caught:
        check(recipe, workspace, 0.8 * memory.tensors, monkeypatch)
    assert "train.activation_checkpointing: full" in str(caught.value.fix)


def test_the_change_that_is_named_is_enough(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 0.8 * needed(recipe_of()).tensors
    changed = recipe_of(train={"activation_checkpointing": "full"})
    check(changed, workspace, memory, monkeypatch)
    assert needed(changed).total <= memory


def test_what_is_counted_too_high_is_not_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = recipe_of(train={"parameter_groups": [{"match": "*embed*", "freeze": True}]})
    check(frozen, workspace, 0.5 * needed(frozen).tensors, monkeypatch)
    assert "this run may not fit" in capsys.readouterr().err


def test_models_that_cannot_be_counted_are_left_to_those_who_build_them(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = recipe_of(model={"size": None, "base": "no-such-model"})
    check(unknown, workspace, 1000, monkeypatch)


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "whole_host_memory", lambda: 1 << 30)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert fitting.memory_of_device(CPU) == 1 << 28


def test_before_any_data_is_touched(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "whole_host_memory", lambda: 1 << 20)
    with pytest.raises(ConfigError, match="this run does not fit"):
        Trainer.from_recipe(recipe_of(), workspace=workspace)
    monkeypatch.setattr(fitting, "whole_host_memory", lambda: 1 << 40)
    with pytest.raises(DataError):
        Trainer.from_recipe(recipe_of(), workspace=workspace)
