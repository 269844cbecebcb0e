from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearth.config import Recipe, load_recipe, recipe_hash, to_dict, to_yaml
from hearth.config.problems import OTHER_NAMES, keys_of
from hearth.errors import ConfigError


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str, name: str = "recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def load(path, *overrides, **environ):
    return load_recipe(path, overrides, environ=environ)


def problems(path, *overrides, **environ) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides, **environ)
    assert caught.value.exit_code == 2
    return caught.value.message.splitlines()


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────


def test_later_layers_win_and_every_value_knows_its_source(recipe_file):
    path = recipe_file("preset: tiny\ntrain:\n  learning_rate: 1e-4\n  seed: 1\n  weight_decay: 0.5\n")
    loaded = load(
        path,
        "train.seed=3",
        "data.packing=false",
        HEARTH_TRAIN__SEED="2",
        HEARTH_TRAIN__WEIGHT_DECAY="0.25",
    )
    train = loaded.recipe.train
    assert (train.steps, train.learning_rate, train.weight_decay, train.seed) == (60, 1e-4, 0.25, 3)
    shown = {key: str(source) for key, source in loaded.sources.items()}
    assert shown["train.beta1"] == "default"
    assert shown["train.steps"] == "preset tiny"
    assert shown["train.learning_rate"] == "file recipe.yaml:3"
    assert shown["train.weight_decay"] == "environment HEARTH_TRAIN__WEIGHT_DECAY"
    assert shown["train.seed"] == "command line"
    assert shown["data.packing"] == "command line"
    assert shown["register.name"] == "default"
    assert loaded.preset == "tiny"


def test_sources_cover_exactly_the_values(recipe_file):
    def leaves(value, path=()):
        for key, item in value.items():
            if isinstance(item, dict) and (*path, key) not in {
                ("track", "tags"),
                ("track", "options"),
                ("register", "tags"),
            }:
                yield from leaves(item, (*path, key))
            else:
                yield ".".join((*path, key))

    loaded = load(recipe_file("model: {base: x, adapter: {rank: 4}}\n"))
    assert set(loaded.sources) == set(leaves(to_dict(loaded.recipe)))
    assert str(loaded.sources["model.adapter.rank"]) == "file recipe.yaml:1"
    assert str(loaded.sources["model.adapter.alpha"]) == "default"


def test_a_preset_may_come_from_the_command_line(recipe_file):
    loaded = load(recipe_file("preset: tiny\n"), "preset=small-cpu")
    assert loaded.preset == "small-cpu"
    assert loaded.recipe.model.size == "10M"


def test_an_unknown_preset_is_named_with_the_nearest(recipe_file):
    with pytest.raises(
        ConfigError, match=r"recipe\.yaml: preset: there is no preset 'tny'; did you mean tiny\?"
    ):
        load(recipe_file("preset: tny\n"))
    with pytest.raises(ConfigError, match="command line: preset: there is no preset 'zzz'"):
        load(recipe_file(""), "preset=zzz")
    with pytest.raises(ConfigError, match=r"preset: \['tiny'\] is not the name of a preset"):
        load(recipe_file("preset: [tiny]\n"))


def test_mappings_merge_and_lists_replace(recipe_file):
    path = recipe_file(
        "model: {config: {model_type: llama, hidden_size: 8}}\n"
        "track: {tags: {a: x, b: y}}\nregister: {name: n, aliases: [one, two]}\n"
    )
    loaded = load(path, "model.config.hidden_size=16", "track.tags.b=z", "register.aliases=[three]")
    assert loaded.recipe.model.config == {"model_type": "llama", "hidden_size": 16}
    assert loaded.recipe.track.tags == {"a": "x", "b": "z"}
    assert loaded.recipe.register_.aliases == ("three",)


def test_null_takes_a_value_of_a_lower_layer_away(recipe_file):
    loaded = load(recipe_file("preset: tiny\nmodel: {size: null, base: other}\n"))
    assert (loaded.recipe.model.size, loaded.recipe.model.base) == (None, "other")


def test_an_empty_section_is_its_defaults(recipe_file):
    assert load(recipe_file("train:\nregister:\n")).recipe == Recipe()


def test_toml_is_as_good_as_yaml(recipe_file):
    toml = recipe_file("[train]\nsteps = 3\nlearning_rate = 1e-4\n[track.tags]\nday = 'x'\n", "r.toml")
    yaml = recipe_file("train: {steps: 3, learning_rate: 1e-4}\ntrack: {tags: {day: x}}\n")
    assert load(toml).recipe == load(yaml).recipe
    assert str(load(toml).sources["train.steps"]) == "file r.toml"


def test_other_variables_are_left_alone(recipe_file):
    loaded = load(
        recipe_file(""),
        HEARTH_HOME="x",
        HEARTH_DATABASE_URL="y",
        HEARTH_SERVE__PORT="1",
        PATH="z",
        MY_HEARTH_TRAIN__SEED="9",
    )
    assert loaded.recipe == Recipe()


def test_a_misspelt_variable_is_an_error(recipe_file):
    assert problems(recipe_file(""), HEARTH_TRIAN__SEED="1") == [
        "HEARTH_TRIAN__SEED: trian: unknown key; did you mean train?"
    ]
    assert problems(recipe_file(""), HEARTH_TRAIN__SEDE="1") == [
        "HEARTH_TRAIN__SEDE: train.sede: unknown key; did you mean train.seed?"
    ]


@pytest.mark.parametrize("text", ["train.steps", "=3", ".steps=3", "train.=3", ""])
def test_an_override_is_key_equals_value(recipe_file, text):
    with pytest.raises(ConfigError, match="is not key=value"):
        load(recipe_file(""), text)


def test_an_override_that_is_no_yaml_is_refused(recipe_file):
    with pytest.raises(ConfigError, match=r"train\.steps: '\[1' is not a YAML value"):
        load(recipe_file(""), "train.steps=[1")


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_key_is_told_the_nearest_one(recipe_file):
    path = recipe_file("train:\n  learning_rat: 1e-4\n")
    assert problems(path) == [
        "recipe.yaml: train.learning_rat: unknown key; did you mean train.learning_rate? (line 2)"
    ]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("trian: {steps: 3}", "train"),
        ("train: {learning-rate: 1}", "train.learning_rate"),
        ("train: {Steps: 3}", "train.steps"),
        ("steps: 3", "train.steps"),
        ("train: {sequence_length: 3}", "data.sequence_length"),
        ("train: {sequence_lenght: 3}", "data.sequence_length"),
        ("model: {base: x, adapter: {rnk: 3}}", "model.adapter.rank"),
        ("data: {sources: [{pth: x, path: y}]}", "data.sources[0].path"),
        ("data: {filters: {min_char: 1}}", "data.filters.min_chars"),
        ("register_: {name: x}", "register"),
        ("train: {lr: 1e-3}", "train.learning_rate"),
        ("train: {per_device_train_batch_size: 4}", "train.micro_batch_size"),
        ("model: {base: x, adapter: {lora_alpha: 3}}", "model.adapter.alpha"),
        ("max_seq_length: 512", "data.sequence_length"),
    ],
)
def test_suggestions(recipe_file, text, meant):
    (line,) = problems(recipe_file(text))
    assert f"unknown key; did you mean {meant}?" in line


def test_without_a_near_key_the_known_ones_are_listed(recipe_file):
    (line,) = problems(recipe_file("checkpoint: {zzz: 1}"))
    assert line == (
        "recipe.yaml: checkpoint.zzz: unknown key; known: every, keep, async, best_metric, best_mode (line 1)"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {steps: ten}", "train.steps: 'ten' is not a whole number"),
        ("train: {steps: '10'}", "train.steps: '10' is not a whole number"),
        ("train: {steps: true}", "train.steps: true is not a whole number"),
        ("train: {steps: 1.5}", "train.steps: 1.5 is not a whole number"),
        ("train: {steps: 0}", "train.steps: 0 is not at least 1"),
        ("train: {learning_rate: fast}", "train.learning_rate: 'fast' is not a number"),
        ("train: {learning_rate: 0}", "train.learning_rate: 0 is not more than 0"),
        ("train: {learning_rate: .inf}", "train.learning_rate: inf is not a finite number"),
        ("train: {learning_rate: .nan}", "train.learning_rate: nan is not a finite number"),
        ("train: {beta2: 1.0}", "train.beta2: 1.0 is not less than 1"),
        ("data: {validation_fraction: 1.5}", "data.validation_fraction: 1.5 is not at most 1"),
        ("train: {compile: yes}", "train.compile: 'yes' is not true or false"),
        (
            "train: {schedule: cosin}",
            "train.schedule: 'cosin' is not allowed; "
            "use 'cosine', 'wsd', 'linear', 'inverse_sqrt' or 'constant'",
        ),
        ("train: 5", "train: 5 is not a section with keys"),
        ("train: [1]", "train: [1] is not a section with keys"),
        ("data: {sources: x}", "data.sources: 'x' is not a list"),
        ("data: {sources: [{}]}", "data.sources[0].path: is missing"),
        ("data: {sources: [x]}", "data.sources[0]: 'x' is not a section with keys"),
        ("model: {base: 3}", "model.base: 3 is not text"),
        ("track: {tags: {n: 3}}", "track.tags.n: 3 is not text"),
        ("train: {steps: null, seed: null}", "train.seed: null is not a whole number"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(recipe_file, text, expected):
    lines = problems(recipe_file(text))
    assert len(lines) == 1
    assert lines[0].startswith(f"recipe.yaml: {expected}")


def test_an_adapter_target_of_a_wrong_type(recipe_file):
    lines = problems(recipe_file("model: {base: x, adapter: {target_modules: 3}}"))
    assert lines
    assert all(line.startswith("recipe.yaml: model.adapter.target_modules: 3 is not ") for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {steps: 3, epochs: 1}", "train: give steps or epochs, not both"),
        (
            "train: {batch_size: 10, micro_batch_size: 4}",
            "train: batch_size 10 is not a multiple of micro_batch_size 4",
        ),
        ("train: {steps: 3, warmup_steps: 4}", "train: warmup_steps 4 is more than steps 3"),
        ("train: {early_stopping_patience: 2}", "train: early_stopping_patience needs evaluate_every"),
        ("model: {base: a, size: 10M}", "model: give one of base, size and config, not base and size"),
        ("model: {adapter: {rank: 4}}", "model: adapter needs base"),
        ("data: {dataset: d, sources: [{path: x}]}", "data: give dataset or sources, not both"),
        (
            "data: {sequence_length: 2048}",
            "data.sequence_length 2048 is longer than model.context_length 1024",
        ),
    ],
)
def test_impossible_combinations(recipe_file, text, expected):
    (line,) = problems(recipe_file(text))
    assert expected in line


def test_a_combination_tells_which_part_came_from_where(recipe_file):
    (line,) = problems(recipe_file("preset: tiny\nmodel: {base: mine}\n"))
    assert "give one of base, size and config, not base and size" in line
    assert "model.size comes from preset tiny" in line
    (line,) = problems(recipe_file("train: {steps: 3}\n"), HEARTH_TRAIN__WARMUP_STEPS="9")
    assert line == (
        "HEARTH_TRAIN__WARMUP_STEPS: train: warmup_steps 9 is more than steps 3 "
        "(train.steps comes from recipe.yaml)"
    )


def test_every_mistake_is_listed_with_its_own_place(recipe_file):
    path = recipe_file("train:\n  steps: ten\n  sed: 1\n")
    lines = problems(path, "data.packing=maybe", HEARTH_CHECKPOINT__KEEP="1")
    assert sorted(lines) == [
        "HEARTH_CHECKPOINT__KEEP: checkpoint.keep: 1 is not at least 2",
        "command line: data.packing: 'maybe' is not true or false",
        "recipe.yaml: train.sed: unknown key; did you mean train.seed? (line 3)",
        "recipe.yaml: train.steps: 'ten' is not a whole number (line 2)",
    ]


def test_a_section_replaced_by_a_value_is_blamed_on_its_layer(recipe_file):
    assert problems(recipe_file("train: {steps: 3}\n"), "train=5") == [
        "command line: train: 5 is not a section with keys"
    ]
    assert problems(recipe_file("train: {steps: 3}\n"), "train.steps.x=5") == [
        "command line: train.steps: {'x': 5} is not a whole number"
    ]


# ── paths ────────────────────────────────────────────────────────────────────────────────────────────────


def test_paths_in_a_file_stand_relative_to_it(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    (folder / "base").mkdir(parents=True)
    (folder / "r.yaml").write_text(
        "model: {base: base}\ntokenizer: {base: ../tok}\n"
        "data: {sources: [{path: texts/*.txt}, {path: /abs/x}, {path: stdlib}, {path: ../up}]}\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load("recipes/r.yaml")
    assert loaded.recipe.model.base == str(folder / "base")
    assert loaded.recipe.tokenizer.base == str(tmp_path / "tok")
    assert [source.path for source in loaded.recipe.data.sources] == [
        str(folder / "texts" / "*.txt"),
        "/abs/x",
        "stdlib",
        str(tmp_path / "up"),
    ]
    assert str(loaded.sources["data.sources"]) == "file r.yaml:3"


def test_names_are_no_paths(recipe_file):
    for base in ("chat@production", "hf:org/name", "chat"):
        assert load(recipe_file(f"model: {{base: '{base}'}}\n")).recipe.model.base == base


def test_a_dataset_stands_relative_to_the_file_and_home_is_expanded(recipe_file, tmp_path):
    assert load(recipe_file("data: {dataset: named}\n")).recipe.data.dataset == "named"
    (tmp_path / "here").mkdir()
    assert load(recipe_file("data: {dataset: here}\n")).recipe.data.dataset == str(tmp_path / "here")
    assert load(recipe_file("data: {dataset: d/x}\n")).recipe.data.dataset == str(tmp_path / "d" / "x")
    assert load(recipe_file("data: {dataset: ~/x}\n")).recipe.data.dataset == str(Path("~/x").expanduser())


def test_paths_on_the_command_line_stand_as_they_are(recipe_file):
    loaded = load(recipe_file(""), "data.dataset=d/x", "model.base=./m")
    assert (loaded.recipe.data.dataset, loaded.recipe.model.base) == ("d/x", "./m")


# ── hash and printing ────────────────────────────────────────────────────────────────────────────────────


def test_the_hash_depends_on_values_not_on_layers(recipe_file):
    in_file = load(recipe_file("train: {steps: 3, learning_rate: 1e-3}\n"))
    elsewhere = load(recipe_file("", "b.yaml"), "train.learning_rate=0.001", HEARTH_TRAIN__STEPS="3")
    assert recipe_hash(in_file.recipe) == recipe_hash(elsewhere.recipe)
    assert recipe_hash(in_file.recipe) != recipe_hash(Recipe())
    assert recipe_hash(Recipe.model_validate({"train": {"weight_decay": 0}})) == recipe_hash(
        Recipe.model_validate({"train": {"weight_decay": 0.0}})
    )


def test_the_hash_is_the_same_in_every_process_and_version():
    """A golden value: a change of defaults or of the canonical form must be meant."""
    recipe = Recipe.model_validate({"train": {"steps": 3}, "track": {"tags": {"b": "ü", "a": "x"}}})
    reordered = Recipe.model_validate({"track": {"tags": {"a": "x", "b": "ü"}}, "train": {"steps": 3}})
    assert recipe_hash(recipe) == recipe_hash(reordered)
    assert len(recipe_hash(recipe)) == 64


@settings(deadline=None, max_examples=50)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(1e-12, 1e6),
            "epsilon": st.floats(1e-300, 1.0),
            "steps": st.integers(1, 10**12),
            "seed": st.integers(-(2**60), 2**60),
            "precision": st.sampled_from(["auto", "bf16", "fp32"]),
            "compile": st.booleans(),
        },
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=8), max_size=3),
)
def test_what_is_printed_loads_back(tmp_path_factory, train, tags):
    recipe = Recipe.model_validate({"train": train, "track": {"tags": tags}})
    path = tmp_path_factory.mktemp("round") / "r.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    again = load(path).recipe
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_a_recipe_loads_itself(recipe_file, monkeypatch):
    monkeypatch.delenv("HEARTH_TRAIN__STEPS", raising=False)
    assert Recipe.load(recipe_file("train: {steps: 7}\n")).train.steps == 7


def test_what_others_call_our_keys_is_none_of_ours_and_leads_to_one_of_them():
    names = {path[-1] for path in keys_of(Recipe)}
    assert not OTHER_NAMES.keys() & names
    assert set(OTHER_NAMES.values()) <= names
