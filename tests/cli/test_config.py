from __future__ import annotations

import jsonschema
import pytest

from hearth.config import load_recipe, recipe_hash


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: tiny\ntrain:\n  learning_rate: 1e-4\n")
    return path


def test_show_prints_a_recipe_that_loads_back(hearth, recipe, tmp_path):
    result = hearth("config", "show", recipe, "train.steps=7", "track.name=a [b]")
    assert result.code == 0
    (tmp_path / "again.yaml").write_text(result.out)
    again = load_recipe(tmp_path / "again.yaml", environ={}).recipe
    assert again == load_recipe(recipe, ["train.steps=7", "track.name=a [b]"], environ={}).recipe
    assert recipe_hash(again) in result.out


def test_show_json(hearth, recipe):
    result = hearth("config", "show", recipe, "--json")
    assert result.json["recipe"]["train"]["learning_rate"] == 1e-4
    assert result.json["hash"] == recipe_hash(load_recipe(recipe, environ={}).recipe)


def test_sources(hearth, recipe, monkeypatch):
    monkeypatch.setenv("HEARTH_TRAIN__SEED", "5")
    result = hearth("config", "show", recipe, "train.beta1=0.8", "--sources", "--json")
    assert result.json["train.seed"] == {"value": 5, "source": "environment HEARTH_TRAIN__SEED"}
    assert result.json["train.beta1"] == {"value": 0.8, "source": "command line"}
    assert result.json["train.learning_rate"]["source"] == "file recipe.yaml:3"
    assert result.json["model.size"]["source"] == "preset tiny"
    assert result.json["train.beta2"]["source"] == "default"
    table = hearth("config", "show", recipe, "--sources").out
    (line,) = [line for line in table.splitlines() if line.startswith("train.learning_rate")]
    assert line.split() == ["train.learning_rate", "0.0001", "file", "recipe.yaml:3"]


def test_mistakes_exit_with_2_and_name_the_key(hearth, recipe, tmp_path):
    result = hearth("config", "show", recipe, "train.learning_rat=1")
    assert (result.code, result.out) == (2, "")
    assert "command line: train.learning_rat: unknown key; did you mean train.learning_rate?" in result.err
    for path, message in {tmp_path / "none.yaml": "no file", tmp_path: "is a folder"}.items():
        result = hearth("config", "show", path)
        assert result.code == 2
        assert message in result.err


def test_schema_is_json_for_editors(hearth):
    recipe, serve = hearth("config", "schema").json, hearth("config", "schema", "--for", "serve").json
    jsonschema.Draft202012Validator.check_schema(recipe)
    assert "train" in recipe["properties"]
    assert "port" in serve["properties"]


def test_presets_are_listed(hearth):
    assert "tiny" in [preset["name"] for preset in hearth("config", "presets", "--json").json]
    assert "small-cpu" in hearth("config", "presets").out
