from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from hearth.config import ServeConfig, json_schema, list_presets, load_recipe, load_settings
from hearth.config.loading import PRESETS
from hearth.config.sources import read_document

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = [
    *sorted(PRESETS.glob("*.yaml")),
    *sorted(path for path in EXAMPLES.rglob("*") if path.suffix in (".yaml", ".yml", ".toml")),
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_for_us_and_for_editors(path):
    load_recipe(path, environ={})
    jsonschema.Draft202012Validator(json_schema()).validate(read_document(path).value)


def test_there_are_presets_and_each_says_what_for():
    assert {"tiny", "small-cpu", "sft", "lora"} <= set(list_presets())
    for path in PRESETS.iterdir():
        assert path.suffix == ".yaml"
        assert path.read_text().startswith("# ")
        assert "preset" not in read_document(path).value, "presets do not chain"


@pytest.mark.parametrize(
    "value",
    [
        {"train": {"learning_rat": 1}},
        {"train": {"steps": "ten"}},
        {"preset": "nope"},
        {"data": {"sources": [{}]}},
        {"model": {"base": 3}},
    ],
)
def test_the_schema_catches_what_we_catch(value):
    validator = jsonschema.Draft202012Validator(json_schema())
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(value)


@pytest.mark.parametrize("value", [{}, {"train": None}, {"preset": "tiny"}, {"register": {"name": "x"}}])
def test_the_schema_lets_pass_what_we_let_pass(value):
    jsonschema.Draft202012Validator(json_schema()).validate(value)


def test_schemas_are_schemas_and_every_key_is_described():
    for cls in (None, ServeConfig):
        schema = json_schema() if cls is None else json_schema(cls)
        jsonschema.Draft202012Validator.check_schema(schema)
        for section in (schema, *schema["$defs"].values()):
            for key, entry in section["properties"].items():
                assert entry.get("description"), f"{section['title']}.{key} has no description"


def test_server_settings_load_in_the_same_layers(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("port: 1234\nmodels:\n  - model: chat@production\n    max_model_len: 512\n")
    environ = {"HEARTH_SERVE__LOG_LEVEL": "debug", "HEARTH_TRAIN__STEPS": "3"}
    loaded = load_settings(ServeConfig, path, ["host=0.0.0.0"], environ=environ)
    settings = loaded.settings
    assert (settings.port, settings.host, settings.log_level) == (1234, "0.0.0.0", "debug")
    assert settings.models[0].max_model_len == 512
    assert str(loaded.sources["port"]) == "file serve.yaml:1"
    assert str(loaded.sources["log_level"]) == "environment HEARTH_SERVE__LOG_LEVEL"
    assert load_settings(ServeConfig, environ={}).settings == ServeConfig()


def test_mistakes_in_server_settings(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("prot: 1\nmodels: [{model: a}, {model: a}]\n")
    with pytest.raises(ValueError, match=r"serve\.yaml: prot: unknown key; did you mean port\? \(line 1\)"):
        load_settings(ServeConfig, path, environ={})
    with pytest.raises(ValueError, match="two models are called 'a'"):
        load_settings(ServeConfig, None, ["models=[{model: a}, {model: a}]"], environ={})
    with pytest.raises(ValueError, match="HEARTH_SERVE__PORT: port: 70000 is not at most 65535"):
        load_settings(ServeConfig, environ={"HEARTH_SERVE__PORT": "70000"})
    for given, says in (
        (["admin_key=short"], "admin_key has fewer than 8 characters"),
        (["admin_key=secret-key-1", "api_keys=[secret-key-1]"], "admin_key is one of api_keys"),
        (["max_models=1", "models=[{model: a}, {model: b}]"], "there are 2 models, and max_models is 1"),
        (["max_models=0"], "max_models"),
        (["idle_unload_seconds=-1"], "idle_unload_seconds"),
    ):
        with pytest.raises(ValueError, match=says):
            load_settings(ServeConfig, None, given, environ={})
    environ = {"HEARTH_SERVE__ADMIN_KEY": "secret-key-1"}
    assert "secret-key-1" not in repr(load_settings(ServeConfig, environ=environ).settings)
