"""The few kinds of Kubernetes objects that a job needs, as dataclasses, and their YAML.

Field names are the API's in snake case. None and empty values are left out of a manifest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

# Names that are not the field's in camel case.
_NAMES = {"cluster_ip": "clusterIP"}


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Name and labels of an object."""

    name: str | None = None
    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EnvVar:
    """A variable; ``value_from`` where Kubernetes fills it in."""

    name: str
    value: str | None = None
    value_from: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class VolumeMount:
    """Where a container sees a volume."""

    name: str
    mount_path: str
    sub_path: str | None = None
    read_only: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A volume of one of three kinds."""

    name: str
    persistent_volume_claim: Mapping[str, Any] | None = None
    config_map: Mapping[str, Any] | None = None
    empty_dir: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ResourceRequirements:
    """What a container asks for, and may use at most."""

    requests: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Container:
    """One container; ``command`` None takes that of the image."""

    name: str
    image: str | None = None
    command: tuple[str, ...] = ()
    env: tuple[EnvVar, ...] = ()
    resources: ResourceRequirements | None = None
    volume_mounts: tuple[VolumeMount, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PodSpec:
    """A pod."""

    containers: tuple[Container, ...]
    volumes: tuple[Volume, ...] = ()
    restart_policy: str | None = None
    subdomain: str | None = None
    termination_grace_period_seconds: int | None = None


@dataclass(frozen=True, kw_only=True)
class PodTemplate:
    """What pods are made from."""

    spec: PodSpec
    metadata: Metadata | None = None


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """batch/v1 Job; a pod for each index."""

    template: PodTemplate
    completions: int
    parallelism: int
    completion_mode: str = "Indexed"
    backoff_limit: int | None = None
    active_deadline_seconds: int | None = None


@dataclass(frozen=True, kw_only=True)
class JobTemplate:
    """What the jobs of a JobSet are made from."""

    spec: JobSpec


@dataclass(frozen=True, kw_only=True)
class ReplicatedJob:
    """A group of equal jobs in a JobSet."""

    name: str
    template: JobTemplate
    replicas: int = 1


@dataclass(frozen=True, kw_only=True)
class JobSetSpec:
    """jobset.x-k8s.io JobSet."""

    replicated_jobs: tuple[ReplicatedJob, ...]
    network: Mapping[str, Any]
    failure_policy: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """The processes of a TrainJob."""

    image: str | None
    command: tuple[str, ...]
    num_nodes: int
    num_proc_per_node: int
    env: tuple[EnvVar, ...] = ()
    resources_per_node: ResourceRequirements | None = None


@dataclass(frozen=True, kw_only=True)
class TrainJobSpec:
    """trainer.kubeflow.org TrainJob, version 2 of Kubeflow's trainer."""

    runtime_ref: Mapping[str, str]
    trainer: Trainer
    runtime_patches: tuple[Mapping[str, Any], ...] = ()
    active_deadline_seconds: int | None = None


@dataclass(frozen=True, kw_only=True)
class ServiceSpec:
    """A service without an address of its own: it gives pods their names."""

    selector: Mapping[str, str]
    cluster_ip: str = "None"
    publish_not_ready_addresses: bool = True


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An object as it is submitted. ``data`` is of a ConfigMap, ``spec`` of any other kind."""

    api_version: str
    kind: str
    metadata: Metadata
    spec: JobSpec | JobSetSpec | TrainJobSpec | ServiceSpec | None = None
    data: Mapping[str, str] = field(default_factory=dict)


def to_dict(value: Any) -> Any:
    """A dataclass as the API writes it."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((_camel(each.name), to_dict(getattr(value, each.name))) for each in fields(value))
        return {name: item for name, item in pairs if item is not None and item not in ({}, [])}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(item) for item in value]
    return value


def to_yaml(manifests: list[Manifest]) -> str:
    """Documents of one file."""
    import yaml

    documents = [to_dict(each) for each in manifests]
    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=110)


def _camel(name: str) -> str:
    return _NAMES.get(name) or re.sub(r"_(\w)", lambda match: match.group(1).upper(), name)
