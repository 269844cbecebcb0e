from __future__ import annotations

import json

import pytest

from hearth.workspace import Workspace

FINGERPRINT = "f00dfeed" * 8


@pytest.fixture
def chain(workspace_dir, tmp_path):
    """A source, a dataset, a run, a model and a deployment; yields the run's id."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with Workspace.open() as workspace:
        run = workspace.runs.create("train", name="r")
        run.finish()
        workspace.lineage.add("source:books", f"dataset:{FINGERPRINT}", "prepared")
        workspace.registry.create_version("chat", model, run_id=run.id, dataset_fingerprint=FINGERPRINT)
        workspace.registry.promote("chat", "production", force=True, reason="test")
        workspace.lineage.add("model:chat@1", "deployment:web", "served")
    return run.id


def test_the_tree_of_a_model(hearth, chain):
    result = hearth("lineage", "chat@production")
    assert result.code == 0
    assert result.out == (
        "model:chat@1\n\nmade from\n"
        f"  └─ produced: run:{chain}\n"
        f"     └─ trained: dataset:{FINGERPRINT}\n"
        "        └─ prepared: source:books\n"
        "\nmade into\n"
        "  └─ served: deployment:web\n"
    )


@pytest.mark.parametrize(
    "ref", [FINGERPRINT, FINGERPRINT[:6], f"dataset:{FINGERPRINT}", f"dataset:{FINGERPRINT[:4]}"]
)
def test_a_dataset_by_fingerprint_or_prefix(hearth, chain, ref):
    result = hearth("lineage", ref, "--json").json
    assert result["ref"] == f"dataset:{FINGERPRINT}"
    assert result["made_from"]["children"][0]["ref"] == "source:books"
    assert result["made_into"]["children"][0]["ref"] == f"run:{chain}"


def test_a_run_by_id_or_prefix(hearth, chain):
    for ref in (chain, chain[:5], f"run:{chain}"):
        assert hearth("lineage", ref, "--json").json["ref"] == f"run:{chain}"


def test_branches_are_drawn(hearth, chain):
    with Workspace.open() as workspace:
        workspace.lineage.add("source:web", f"dataset:{FINGERPRINT}", "prepared")
    lines = hearth("lineage", "chat").out.splitlines()
    assert "        ├─ prepared: source:books" in lines
    assert "        └─ prepared: source:web" in lines


def test_very_many_branches_are_counted(hearth, chain):
    with Workspace.open() as workspace:
        workspace.lineage.add_many((f"source:{i}", "dataset:wide", "prepared") for i in range(45))
    lines = hearth("lineage", "dataset:wide").out.splitlines()
    assert "  └─ and 5 more; --json lists them all" in lines
    assert sum("├─ prepared" in line for line in lines) == 40
    assert len(hearth("lineage", "dataset:wide", "--json").json["made_from"]["children"]) == 45


def test_an_ambiguous_prefix_lists_what_it_may_mean(hearth, chain):
    with Workspace.open() as workspace:
        workspace.lineage.add("dataset:f00dbeef", "run:x", "trained")
    result = hearth("lineage", "f00d")
    assert result.code == 2
    assert "dataset:f00dbeef" in result.err
    assert f"dataset:{FINGERPRINT}" in result.err


def test_unknown_things(hearth, chain):
    for ref in ("nothing", "dataset:nothing", "chat@9", "%"):
        result = hearth("lineage", ref)
        assert result.code == 2, ref
        assert "nothing here is called" in result.err


def test_a_model_without_lineage_says_so(hearth, chain, tmp_path):
    (tmp_path / "model" / "config.json").write_text("{}")
    with Workspace.open() as workspace:
        workspace.registry.create_version("bare", tmp_path / "model")
    result = hearth("lineage", "bare")
    assert result.code == 0
    assert "no lineage is recorded for model:bare@1" in result.err


def test_nothing_yet(hearth, workspace_dir):
    result = hearth("lineage", "chat")
    assert result.code == 2
    assert "there is no workspace" in result.err
    assert not workspace_dir.exists()
