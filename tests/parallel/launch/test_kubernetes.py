"""Manifests, against the published models of the API where they are installed."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hearth.errors import ConfigError
from hearth.parallel.launch.backend import Watch
from hearth.parallel.launch.kubernetes import KubernetesBackend, check_documents, status_of
from hearth.parallel.launch.spec import JobSpec, Resources

KINDS = ["trainjob", "jobset", "job"]
Make = Callable[..., JobSpec]


@pytest.fixture
def pod_spec(bare_spec: Make, tmp_path: Path) -> Make:
    def make(kind: str = "job", **changes: Any) -> JobSpec:
        recipe = tmp_path / "my recipe.yaml"
        recipe.write_text("train: {steps: 5}\n")
        given = {
            "recipe": str(recipe), "workspace": "/hearth/.hearth", "image": "registry/hearth:1", "nodes": 2,
            "processes": 8, "resources": Resources(8, 64, 1024), "time_limit": 3600,
            "overrides": ("train.steps=9",),
        }  # fmt: skip
        options = {"kind": kind, **changes.pop("options", {})}
        return bare_spec(**{**given, **changes}, options=options)

    return make


def render(spec: JobSpec) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KubernetesBackend().render(spec).files["job.yaml"]))


def container_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    if document["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    if document["kind"] == "TrainJob":
        return dict(spec["trainer"])
    return dict(spec["template"]["spec"]["containers"][0])


def run_command(command: list[str], folder: Path, *, index: int) -> list[str]:
    """The arguments that torchrun gets in the pod of this index."""
    tool = folder / "torchrun"
    tool.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    tool.chmod(0o755)
    environ = {"PATH": f"{folder}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": str(index)}
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_the_models_describe(pod_spec: Make, kind: str) -> None:
    pytest.importorskip("kubeflow_trainer_api", reason="install the extra kubernetes")
    check_documents(render(pod_spec(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_typos_and_wrong_types_are_refused(pod_spec: Make, kind: str) -> None:
    pytest.importorskip("kubeflow_trainer_api", reason="install the extra kubernetes")
    documents = render(pod_spec(kind))
    broken = copy.deepcopy(documents)
    container_of(broken[-1])["env"][0]["valu"] = "x"
    with pytest.raises(ConfigError, match=r"has an unknown field: spec\..*env\[0\]\.valu"):
        check_documents(broken)
    broken = copy.deepcopy(documents)
    broken[-1]["spec"]["suspend"] = "perhaps"
    with pytest.raises(ConfigError, match="suspend: Input should be a valid boolean"):
        check_documents(broken)
    broken = copy.deepcopy(documents)
    del container_of(broken[-1])["env"][0]["name"]
    with pytest.raises(ConfigError, match=r"lacks a field: spec\..*env\[0\]\.name"):
        check_documents(broken)


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_core_objects_pass_kubernetes_own_schema(pod_spec: Make, kind: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in render(pod_spec(kind)):
        if document["kind"] == "JobSet":
            job = document["spec"]["replicatedJobs"][0]["template"]
            document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_pods_find_recipe_workspace_and_each_other(pod_spec: Make, kind: str, tmp_path: Path) -> None:
    documents = render(pod_spec(kind))
    kinds = {"trainjob": ["ConfigMap", "TrainJob"], "jobset": ["ConfigMap", "JobSet"]}
    assert [document["kind"] for document in documents] == kinds.get(kind, ["ConfigMap", "Service", "Job"])
    assert documents[0]["data"] == {"job-1.yaml": "train: {steps: 5}\n"}
    container = container_of(documents[-1])
    words = run_command(container["command"], tmp_path, index=1)
    assert words[-2:] == ["/hearth/job-1.yaml", "train.steps=9"]
    env = {each["name"]: each["value"] for each in container["env"]}
    assert env["HEARTH_JOB_DIR"] == "/hearth/.hearth/jobs/job-1"
    host = "job-1-0.job-1" if kind == "job" else "job-1-node-0-0.job-1"
    assert f"--rdzv-endpoint={host}:29400" in words
    assert any(word.startswith("--rdzv-conf=is_host=0,join_timeout=600") for word in words)
    assert "is_host=1" in " ".join(run_command(container["command"], tmp_path, index=0))
    if kind == "trainjob":
        assert (container["numNodes"], container["numProcPerNode"]) == (2, 8)
    resources = container["resourcesPerNode" if kind == "trainjob" else "resources"]
    assert resources["limits"] == {"cpu": "64", "memory": "1024Mi", "nvidia.com/gpu": "8"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_looks_like_a_variable_of_kubernetes_reaches_the_process(
    pod_spec: Make, kind: str, tmp_path: Path
) -> None:
    spec = pod_spec(kind, overrides=("track.name=$(A)",), environment=(("A", "1"), ("B", "$(A)")))
    container = container_of(render(spec)[-1])
    values = {each["name"]: each["value"] for each in container["env"]}
    assert expanded(values["B"], values) == "$(A)"
    command = [expanded(word, values) for word in container["command"]]
    words = run_command(command, tmp_path, index=1)
    assert words[-1] == "track.name=$(A)"
    assert any(word.startswith("--rdzv-conf=is_host=0,") for word in words)


def expanded(text: str, values: dict[str, str]) -> str:
    """As Kubernetes does it: $(NAME) of a known name is replaced, $$ is $, and the rest stays."""

    def value(found: re.Match[str]) -> str:
        if found.group() == "$$":
            return "$"
        return values.get(found.group(1), found.group())

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


def test_options_reach_the_manifests(pod_spec: Make) -> None:
    options = {"namespace": "lab", "claim": "data", "gpu-resource": "amd.com/gpu", "save-seconds": "60"}
    spec = pod_spec("job", options=options)
    document = render(spec)[-1]
    pod = document["spec"]["template"]["spec"]
    assert document["metadata"]["namespace"] == "lab"
    assert pod["terminationGracePeriodSeconds"] == 90
    assert {"name": "hearth", "persistentVolumeClaim": {"claimName": "data"}} in pod["volumes"]
    assert pod["containers"][0]["resources"]["limits"]["amd.com/gpu"] == "8"
    assert KubernetesBackend().render(spec).commands == (
        ("kubectl", "--namespace", "lab", "apply", "-f", "-"),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pod"}, "kind=pod is unknown"),
        ({"image": None}, "needs an image"),
        ({"name": "x" * 51}, "has 51 letters"),
    ],
)
def test_what_kubernetes_cannot_be_asked(pod_spec: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KubernetesBackend().render(pod_spec(**changes))


def test_without_kubectl_the_fix_is_told(
    pod_spec: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = pod_spec()
    with pytest.raises(ConfigError, match="kubectl was not found") as caught:
        KubernetesBackend().submit(spec, KubernetesBackend().render(spec), Watch())
    assert "install kubectl" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, "pending"),
        ({"active": 2}, "running"),
        ({"replicatedJobsStatus": [{"name": "node", "active": 1}]}, "running"),
        ({"jobsStatus": [{"name": "node", "active": 1}]}, "running"),
        ({"conditions": [{"type": "Complete", "status": "True"}]}, "finished"),
        ({"conditions": [{"type": "Completed", "status": "True"}]}, "finished"),
        ({"conditions": [{"type": "Complete", "status": "False"}], "active": 1}, "running"),
        ({"conditions": [{"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}]}, "failed"),
    ],
)
def test_conditions_in_our_words(status: dict[str, Any], state: str) -> None:
    assert status_of(status, "jobs/job-1").state == state
