"""Jobs for Azure ML, loaded by its own library where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hearth.errors import ConfigError
from hearth.parallel.launch.azureml import AzureBackend, _load_job
from hearth.parallel.launch.backend import Watch
from hearth.parallel.launch.spec import JobSpec, Rendered

Make = Callable[..., JobSpec]
WORKSPACE = "${{outputs.workspace}}"


@pytest.fixture
def cloud_spec(bare_spec: Make, tmp_path: Path) -> Make:
    def make(**changes: Any) -> JobSpec:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("train: {steps: 5}\n")
        given = {"recipe": str(recipe), "workspace": WORKSPACE, "image": "registry/hearth:1", "nodes": 2,
                 "environment": (("A", "b"),)}  # fmt: skip
        return bare_spec(**{**given, **changes})

    return make


def document(spec: JobSpec) -> dict[str, Any]:
    return dict(yaml.safe_load(AzureBackend().render(spec).files["job.yml"]))


def test_the_job_has_a_process_for_each_rank_and_keeps_its_workspace(cloud_spec: Make) -> None:
    found = document(cloud_spec(overrides=("train.steps=9",), time_limit=7200))
    assert found["distribution"] == {"type": "pytorch", "process_count_per_instance": 2}
    assert found["resources"]["instance_count"] == 2
    assert found["limits"] == {"timeout": 7200}
    assert found["environment_variables"] == {"A": "b"}
    assert found["command"] == (
        f"HEARTH_HOME={WORKSPACE} HEARTH_JOB_DIR={WORKSPACE}/jobs/job-1 "
        "python -m hearth.parallel.launch.start recipe.yaml train.steps=9"
    )


def test_no_name_of_a_recipe_takes_the_place_of_the_job(cloud_spec: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "job.yml"
    recipe.write_text("train: {steps: 7}\n")
    rendered = AzureBackend().render(cloud_spec(recipe=str(recipe)))
    assert "hearth.parallel.launch.start recipe.yml" in yaml.safe_load(rendered.files["job.yml"])["command"]
    assert rendered.files["recipe.yml"] == "train: {steps: 7}\n"


def test_the_recipe_travels_with_the_job(cloud_spec: Make) -> None:
    assert AzureBackend().render(cloud_spec()).files["recipe.yaml"] == "train: {steps: 5}\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "needs an environment"),
        ({"options": {"environment": "e@latest"}}, "needs an environment"),
        ({"overrides": ("track.name=a b",)}, "'track.name=a b' cannot be part of the command"),
        ({"overrides": ("track.name=$(id)",)}, "cannot be part of the command"),
    ],
)
def test_what_azure_cannot_be_asked(cloud_spec: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AzureBackend().render(cloud_spec(**changes))


def test_without_the_library_the_extra_is_named(cloud_spec: Make) -> None:
    if importlib.util.find_spec("azure") is not None:
        pytest.skip("azure-ai-ml is installed here")
    spec = cloud_spec()
    with pytest.raises(ConfigError, match="--on azureml needs azure") as caught:
        AzureBackend().submit(spec, AzureBackend().render(spec), Watch())
    assert caught.value.fix == "pip install 'hearth-lm[azureml]'"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the library's own, of classes that it calls experimental
@pytest.mark.parametrize("environment", [None, "hearth@latest"])
def test_azures_own_loader_takes_the_job(cloud_spec: Make, tmp_path: Path, environment: str | None) -> None:
    pytest.importorskip("azure.ai.ml", reason="install the extra azureml")
    changes = {} if environment is None else {"image": None, "options": {"environment": environment}}
    job = _load_job(tmp_path, AzureBackend().render(cloud_spec(**changes)))
    assert (job.name, job.distribution.process_count_per_instance, job.resources.instance_count) == (
        "job-1",
        2,
        2,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ("instance_count", "instance_countt", "instance_countt: Unknown field"),
        ("process_count_per_instance: 2", "process_count_per_instance: two", "Not a valid integer"),
        ("command:", "kommand:", "command: Missing data"),
    ],
)
def test_azures_own_loader_refuses_a_broken_job(
    cloud_spec: Make, tmp_path: Path, good: str, bad: str, words: str
) -> None:
    pytest.importorskip("azure.ai.ml", reason="install the extra azureml")
    files = dict(AzureBackend().render(cloud_spec()).files)
    files["job.yml"] = files["job.yml"].replace(good, bad)
    with pytest.raises(ConfigError, match=words):
        _load_job(tmp_path, Rendered(files))
