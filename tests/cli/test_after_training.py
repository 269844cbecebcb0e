"""What `hearth train` does after the last step: scores, gate, aliases, as the recipe says."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hearth.cli.after_training import how_to_use
from hearth.config import Recipe, to_dict
from hearth.evaluation import parity
from hearth.workspace import Workspace

Run = Callable[..., Any]


@pytest.fixture
def recipe(tmp_path: Path, workspace_dir: Path) -> Path:
    """Two steps over 30 small files, registered as `tiny`."""
    rng = random.Random(5)
    for number in range(30):
        words = rng.choices(["red", "green", "blue", "house", "tree", "river"], k=40)
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(" ".join(words))
    values = {
        "model": {"size": "100K", "context_length": 128},
        "tokenizer": {"vocab_size": 300},
        "data": {"sources": [{"path": "texts"}], "validation_fraction": 0.2, "sequence_length": 32},
        "train": {"steps": 2, "batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
        "evaluate": {"parity_prompts": 8, "parity_tokens": 8},
        "register": {"name": "tiny", "aliases": ["production", "newest"]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_scores_gate_and_aliases(hearth: Run, recipe: Path) -> None:
    done = hearth("train", recipe, "register.tags.kind=test", "--json", "--quiet")
    assert done.code == 0, done.err
    assert done.json["version"] == "tiny@1"
    assert done.json["parity"]["passed"]
    assert done.json["aliases"] == ["production", "newest"]
    with Workspace.open() as workspace:
        version = workspace.registry.get("tiny@production")
        (scores,) = workspace.registry.reports(version.ref, "evaluation")
        (gate,) = workspace.registry.reports(version.ref, "parity")
    assert set(version.aliases) == {"production", "newest"}
    assert version.tags == {"kind": "test"}
    assert scores.report["bits_per_byte"] == done.json["evaluation"]["bits_per_byte"] > 0
    assert len(gate.report["prompts"]) >= 8
    assert gate.report["max_tokens"] == 8


def test_a_failed_gate_sets_no_alias_and_exits_1(
    hearth: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No two numbers are closer than this, so the real gate cannot pass.
    monkeypatch.setattr(parity, "TOLERANCE_NATS", dict.fromkeys(parity.TOLERANCE_NATS, -1.0))
    done = hearth("train", recipe, "--quiet")
    assert done.code == 1
    assert "production, newest were not set" in done.err
    assert "tiny@1" in done.out
    with Workspace.open() as workspace:
        assert not workspace.registry.get("tiny@1").aliases


def test_what_is_switched_off_is_not_done(hearth: Run, recipe: Path) -> None:
    off = ("evaluate.bits_per_byte=false", "evaluate.parity=false", "register.aliases=[]")
    done = hearth("train", recipe, *off, "--json", "--quiet")
    assert done.code == 0, done.err
    assert {"evaluation", "parity"}.isdisjoint(done.json)
    with Workspace.open() as workspace:
        assert workspace.registry.reports("tiny@1") == []


def test_without_a_version_the_model_is_scored_all_the_same(hearth: Run, recipe: Path) -> None:
    unnamed = ("register.name=null", "register.aliases=[]")
    done = hearth("train", recipe, *unnamed, "--json", "--quiet")
    assert done.code == 0, done.err
    assert done.json["evaluation"]["bits_per_byte"] > 0
    assert "parity" not in done.json
    nothing_held_out = hearth("train", recipe, *unnamed, "data.validation_fraction=0", "--json", "--quiet")
    assert nothing_held_out.code == 0, nothing_held_out.err
    assert "nothing was held out" in nothing_held_out.err
    assert "evaluation" not in nothing_held_out.json


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("register.name=null",), "aliases needs name"),
        (("evaluate.parity=false",), "register.aliases needs evaluate.parity"),
    ],
)
def test_aliases_that_could_never_be_set_are_refused(
    hearth: Run, recipe: Path, overrides: tuple[str, ...], message: str
) -> None:
    refused = hearth("train", recipe, *overrides)
    assert refused.code == 2
    assert message in refused.err


@pytest.mark.parametrize(
    ("architecture", "objective", "source", "expected"),
    [
        ("Qwen3ForCausalLM", "pretrain", "text", "hearth generate tiny@1 "),
        ("Qwen3ForCausalLM", "distill", "text", "hearth generate tiny@1 "),
        ("Qwen3ForCausalLM", "one-of-a-package", "text", "hearth generate tiny@1 "),
        ("Qwen3ForCausalLM", "distill", "chat", "hearth chat tiny@1"),
        ("Qwen3ForCausalLM", "dpo", "preference", "hearth chat tiny@1"),
        (
            "Qwen3ForSequenceClassification",
            "reward",
            "preference",
            "train.reinforce.rewards=[{model: tiny@1}]",
        ),
    ],
)
def test_the_last_line_fits_what_was_learnt(
    tmp_path: Path, architecture: str, objective: str, source: str, expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    recipe = {"train": {"objective": objective}, "data": {"sources": [{"format": source}]}}
    assert expected in how_to_use("tiny@1", tmp_path, recipe)


@pytest.mark.parametrize(("base", "expected"), [(None, "<|fim_middle|>'"), ("coder", "Once upon a time'")])
def test_who_fills_in_is_asked_with_the_marks_of_its_tokenizer(
    tmp_path: Path, base: str | None, expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    data = {"sources": [{"path": "code"}], "fim": {"rate": 0.5}}
    recipe = Recipe.model_validate({"model": {"base": base}, "data": data})
    assert how_to_use("tiny@1", tmp_path, to_dict(recipe)).endswith(expected)


def test_one_run_says_that_it_leaves_the_sweep_aside(hearth: Run, recipe: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["sweep"] = {"parameters": {"train.learning_rate": {"log": [1e-4, 1e-2]}}}
    recipe.write_text(yaml.safe_dump(values))
    done = hearth("train", recipe, "--dry-run", "--quiet")
    assert done.code == 0, done.err
    assert "--sweep runs its trials" in done.err


def test_the_result_names_the_next_command(hearth: Run, recipe: Path) -> None:
    off = ("evaluate.bits_per_byte=false", "evaluate.parity=false", "register.aliases=[]")
    done = hearth("train", recipe, *off, "--quiet")
    assert done.code == 0, done.err
    assert "best held-out" in done.out
    assert "hearth generate tiny@1" in done.err
