"""`--on kubernetes`: a TrainJob of Kubeflow's trainer, a JobSet, or a plain Job with a headless service."""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from hearth.errors import ConfigError, TrainingError
from hearth.parallel.launch import manifests as k8s
from hearth.parallel.launch.backend import JobStatus, Submitted, Watch, run_tool
from hearth.parallel.launch.jobs import Job
from hearth.parallel.launch.local import parse_number, require_recipe
from hearth.parallel.launch.spec import JobSpec, Rendered, State
from hearth.parallel.launch.torchrun import SAVE_SECONDS, torchrun_arguments, torchrun_variables

MOUNT = "/hearth"
_PORT = 29400
_FILE = "job.yaml"
_LABEL = "hearth/job"
_LONGEST_NAME = 50  # pods add "-node-0-12345-abcde", and their host names have at most 63 letters
_KINDS = ("trainjob", "jobset", "job")
_PLURALS = {"trainjob": "trainjobs.trainer.kubeflow.org", "jobset": "jobsets.jobset.x-k8s.io", "job": "jobs"}
_FIX = "install kubectl and give it a cluster (kubectl config current-context), or use --dry-run"
# Conditions of the three kinds that are the end of a job.
_ENDINGS: Mapping[str, State] = {"Complete": "finished", "Completed": "finished", "Failed": "failed"}


class KubernetesBackend:
    """Manifests for kubectl. Pods see workspace and data on one volume that all nodes can write."""

    name: ClassVar[str] = "kubernetes"
    UNUSED: ClassVar[frozenset[str]] = frozenset(("--no-requeue",))
    WORKSPACE: ClassVar[str | None] = f"{MOUNT}/.hearth"
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "kind": "trainjob, jobset or job (trainjob)",
        "claim": "PersistentVolumeClaim (ReadWriteMany) with data and workspace, seen as /hearth (hearth)",
        "namespace": "namespace (that of kubectl's context)",
        "runtime": "ClusterTrainingRuntime of a trainjob (torch-distributed)",
        "gpu-resource": "what a GPU is called (nvidia.com/gpu)",
        "save-seconds": f"seconds that a pod has to save when it is ended ({SAVE_SECONDS})",
    }

    def render(self, spec: JobSpec) -> Rendered:
        """One file of manifests, and the command that applies it."""
        kind = spec.option("kind", "trainjob")
        if kind not in _KINDS:
            raise ConfigError(f"--option kind={kind} is unknown", fix=f"use one of {', '.join(_KINDS)}")
        if spec.image is None:
            raise ConfigError(
                "--on kubernetes needs an image with Hearth in it", fix="give --image REGISTRY/NAME:TAG"
            )
        if len(spec.name) > _LONGEST_NAME:
            raise ConfigError(
                f"the name {spec.name!r} has {len(spec.name)} letters, which leaves none for those of pods",
                fix=f"give --name with at most {_LONGEST_NAME}",
            )
        objects = [self._config_map(spec)] if spec.recipe is not None else []
        objects += {"trainjob": self._trainjob, "jobset": self._jobset, "job": self._job}[kind](spec)
        command = ("kubectl", *_namespace(spec), "apply", "-f", "-")
        return Rendered({_FILE: k8s.to_yaml(objects)}, (command,))

    def validate(self, spec: JobSpec, rendered: Rendered) -> list[str]:
        """Each manifest against the published models of Kubeflow's API, which know all three kinds."""
        import yaml

        checked = require_recipe(spec)
        documents = list(yaml.safe_load_all(rendered.files[_FILE]))
        try:
            check_documents(documents)
        except ImportError:
            note = "pip install 'hearth-lm[kubernetes]' checks the manifests too, which were not"
            return [*checked, note]
        return [*checked, f"{len(documents)} manifests are what the models of kubeflow-trainer-api describe"]

    def submit(self, spec: JobSpec, rendered: Rendered, watch: Watch) -> Submitted:  # noqa: ARG002
        """kubectl apply; returns at once."""
        text = rendered.files[_FILE]
        run_tool(rendered.commands[0], what="submitting to Kubernetes", fix=_FIX, stdin=text)
        return Submitted({"object": f"{_plural(spec)}/{spec.name}"})

    def status(self, job: Job) -> JobStatus:
        """From the object's conditions and its pods."""
        target = job.require_handle("object")
        command = ["kubectl", *_namespace(job.spec), "get", target, "-o", "json"]
        try:
            found = json.loads(run_tool(command, what="asking Kubernetes", fix=_FIX))
        except TrainingError as error:
            if "not found" in error.message.lower():
                return JobStatus("unknown", f"{target} is not in the cluster any more")
            raise
        return status_of(found.get("status") or {}, target)

    def logs(self, job: Job) -> Iterator[str]:
        """Of the pods that are still there."""
        selector = f"{_LABEL}={job.name}"
        command = ["kubectl", *_namespace(job.spec), "logs", "-l", selector, "--prefix", "--tail=-1"]
        command.append(f"--max-log-requests={max(5, job.spec.nodes)}")  # kubectl refuses more than 5 else
        yield from run_tool(command, what="reading logs", fix=_FIX).splitlines()

    def cancel(self, job: Job) -> str:
        """Delete the objects; pods get SIGTERM, and their time to save."""
        text = (job.dir / "rendered" / _FILE).read_text(encoding="utf-8")
        flags = ["--wait=false", "--ignore-not-found"]
        command = ["kubectl", *_namespace(job.spec), "delete", *flags, "-f", "-"]
        run_tool(command, what="cancelling", fix=_FIX, stdin=text)
        return f"deleted {job.require_handle('object')}; its pods save first"

    # ── the three kinds ──────────────────────────────────────────────────────────────────────────────────

    def _trainjob(self, spec: JobSpec) -> list[k8s.Manifest]:
        pod = self._pod(spec, command=())
        mounts = {
            "name": "node",
            "volumeMounts": [k8s.to_dict(each) for each in pod.containers[0].volume_mounts],
        }
        pod_patch = {
            "terminationGracePeriodSeconds": pod.termination_grace_period_seconds,
            "volumes": [k8s.to_dict(each) for each in pod.volumes],
            "containers": [mounts],
        }
        template = {"metadata": {"labels": {_LABEL: spec.name}}, "spec": pod_patch}
        job_patch = {"name": "node", "template": {"spec": {"template": template}}}
        patch = {
            "manager": "hearth.dev/launch",
            "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job_patch]}}},
        }
        trainer = k8s.Trainer(
            image=spec.image,
            # Kubeflow names hosts as JobSet does, which it is made of. What the runtime sets for torchrun
            # (PET_…) is for the static rendezvous, which cannot restart.
            command=_torchrun(spec, f"{spec.name}-node-0-0.{spec.name}"),
            num_nodes=spec.nodes,
            num_proc_per_node=spec.processes,
            env=pod.containers[0].env,
            resources_per_node=pod.containers[0].resources,
        )
        job = k8s.TrainJobSpec(
            runtime_ref={"name": spec.option("runtime") or "torch-distributed"},
            trainer=trainer,
            runtime_patches=(patch,),
            active_deadline_seconds=spec.time_limit,
        )
        return [self._manifest(spec, "trainer.kubeflow.org/v1alpha1", "TrainJob", job)]

    def _jobset(self, spec: JobSpec) -> list[k8s.Manifest]:
        # JobSet names hosts JOBSET-GROUP-JOB-INDEX.SUBDOMAIN.
        command = _torchrun(spec, f"{spec.name}-node-0-0.{spec.name}")
        nodes = self._indexed(spec, self._pod(spec, command=command), backoff_limit=0)
        job_set = k8s.JobSetSpec(
            replicated_jobs=(k8s.ReplicatedJob(name="node", template=k8s.JobTemplate(spec=nodes)),),
            network={"enableDNSHostnames": True, "subdomain": spec.name, "publishNotReadyAddresses": True},
            failure_policy={"maxRestarts": spec.max_restarts},
        )
        return [self._manifest(spec, "jobset.x-k8s.io/v1alpha2", "JobSet", job_set)]

    def _job(self, spec: JobSpec) -> list[k8s.Manifest]:
        command = _torchrun(spec, f"{spec.name}-0.{spec.name}")
        pod = self._pod(spec, command=command, subdomain=spec.name)
        job = self._indexed(spec, pod, backoff_limit=spec.max_restarts * spec.nodes)
        service = k8s.ServiceSpec(selector={_LABEL: spec.name})
        return [
            self._manifest(spec, "v1", "Service", service),
            self._manifest(spec, "batch/v1", "Job", job),
        ]

    # ── their parts ──────────────────────────────────────────────────────────────────────────────────────

    def _manifest(self, spec: JobSpec, api_version: str, kind: str, body: Any) -> k8s.Manifest:
        return k8s.Manifest(api_version=api_version, kind=kind, metadata=_metadata(spec), spec=body)

    def _config_map(self, spec: JobSpec) -> k8s.Manifest:
        assert spec.recipe is not None
        recipe = Path(spec.recipe)
        data = {_recipe_name(spec): recipe.read_text(encoding="utf-8")}
        return k8s.Manifest(api_version="v1", kind="ConfigMap", metadata=_metadata(spec), data=data)

    def _indexed(self, spec: JobSpec, pod: k8s.PodSpec, *, backoff_limit: int) -> k8s.JobSpec:
        template = k8s.PodTemplate(spec=pod, metadata=k8s.Metadata(labels={_LABEL: spec.name}))
        return k8s.JobSpec(
            template=template,
            completions=spec.nodes,
            parallelism=spec.nodes,
            backoff_limit=backoff_limit,
            active_deadline_seconds=spec.time_limit,
        )

    def _pod(self, spec: JobSpec, *, command: tuple[str, ...], subdomain: str | None = None) -> k8s.PodSpec:
        save_seconds = int(
            parse_number(spec.option("save-seconds") or str(SAVE_SECONDS), "save-seconds", int)
        )
        claim = {"claimName": spec.option("claim") or "hearth"}
        volumes = [
            k8s.Volume(name="hearth", persistent_volume_claim=claim),
            # torch's data workers hand tensors on in shared memory, of which a container has 64 MiB.
            k8s.Volume(name="shm", empty_dir={"medium": "Memory"}),
        ]
        mounts = [
            k8s.VolumeMount(name="hearth", mount_path=MOUNT),
            k8s.VolumeMount(name="shm", mount_path="/dev/shm"),  # noqa: S108 - in the container
        ]
        if spec.recipe is not None:
            # Beside the data: what is relative in a recipe is so to the folder that the recipe lies in.
            name = _recipe_name(spec)
            volumes.append(k8s.Volume(name="recipe", config_map={"name": spec.name}))
            mounts.append(k8s.VolumeMount(name="recipe", mount_path=f"{MOUNT}/{name}", sub_path=name))
        variables = {**torchrun_variables(save_seconds), **spec.variables()}
        container = k8s.Container(
            name="node",
            image=spec.image,
            command=command,
            env=tuple(k8s.EnvVar(name=name, value=_literal(value)) for name, value in variables.items()),
            resources=_resources(spec),
            volume_mounts=tuple(mounts),
        )
        return k8s.PodSpec(
            containers=(container,),
            volumes=tuple(volumes),
            restart_policy="Never",
            subdomain=subdomain,
            termination_grace_period_seconds=save_seconds + 30,
        )


def check_documents(documents: list[dict[str, Any]]) -> None:
    """Raise ConfigError for a manifest that is not what the models of kubeflow-trainer-api describe.

    Wrong types are the models' own errors. On the way through them a field that they do not know gets lost,
    and one that they miss is added. Raises ImportError without the library.
    """
    from pydantic import ValidationError

    models = importlib.import_module("kubeflow_trainer_api.models")

    known = {
        "ConfigMap": models.IoK8sApiCoreV1ConfigMap,
        "Service": models.IoK8sApiCoreV1Service,
        "Job": models.IoK8sApiBatchV1Job,
        "JobSet": models.JobsetV1alpha2JobSet,
        "TrainJob": models.TrainerV1alpha1TrainJob,
    }
    for document in documents:
        kind = document["kind"]
        try:
            kept = known[kind].from_dict(document).to_dict()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{kind} {document['metadata']['name']}: {where}: {first['msg']}") from error
        name = document["metadata"]["name"]
        if lost := _lost(document, kept):
            raise ConfigError(f"{kind} {name} has an unknown field: {lost}")
        if added := _lost(kept, document):
            raise ConfigError(f"{kind} {name} lacks a field: {added}")


def status_of(status: Mapping[str, Any], target: str) -> JobStatus:
    """What the ``status`` of a TrainJob, JobSet or Job says."""
    for condition in status.get("conditions") or []:
        if condition.get("status") == "True" and condition.get("type") in _ENDINGS:
            words = " ".join(str(condition[key]) for key in ("reason", "message") if condition.get(key))
            return JobStatus(_ENDINGS[condition["type"]], f"{target}: {words or condition['type']}")
    groups = [status, *(status.get("jobsStatus") or []), *(status.get("replicatedJobsStatus") or [])]
    active = sum(int(group.get("active") or 0) for group in groups)
    if active:
        return JobStatus("running", f"{target}: {active} active")
    return JobStatus("pending", f"{target}: nothing runs yet")


def _lost(given: Any, kept: Any, path: str = "") -> str | None:
    """The first path in ``given`` that is not in ``kept``."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            where = f"{path}.{key}" if path else key
            if key not in kept:
                return where
            if (found := _lost(value, kept[key], where)) is not None:
                return found
    elif isinstance(given, list) and isinstance(kept, list):
        for index, value in enumerate(given):
            if index >= len(kept):
                return f"{path}[{index}]"
            if (found := _lost(value, kept[index], f"{path}[{index}]")) is not None:
                return found
    return None


def _torchrun(spec: JobSpec, host: str) -> tuple[str, ...]:
    """The command of a pod. The first knows that it is so: its name may not be resolved yet when it asks."""
    arguments = torchrun_arguments(spec, endpoint=f"{host}:{_PORT}")
    before = arguments[: len(arguments) - len(spec.arguments())]
    words = _literal(shlex.join(["torchrun", *before, *_arguments(spec)]))
    is_host = 'is_host=$([ "$JOB_COMPLETION_INDEX" = 0 ] && echo 1 || echo 0)'
    return ("sh", "-c", "exec " + words.replace("--rdzv-conf=", f"--rdzv-conf={is_host},", 1))


def _literal(text: str) -> str:
    """As Kubernetes leaves it: it puts the value of a variable in the place of $(NAME)."""
    return text.replace("$(", "$$(")


def _arguments(spec: JobSpec) -> list[str]:
    """The recipe is elsewhere in a pod."""
    return [f"{MOUNT}/{_recipe_name(spec)}" if word == spec.recipe else word for word in spec.arguments()]


def _recipe_name(spec: JobSpec) -> str:
    assert spec.recipe is not None
    return f"{spec.name}{Path(spec.recipe).suffix}"


def _resources(spec: JobSpec) -> k8s.ResourceRequirements:
    amounts = {}
    if spec.resources.cpus is not None:
        amounts["cpu"] = str(spec.resources.cpus)
    if spec.resources.memory is not None:
        amounts["memory"] = f"{spec.resources.memory}Mi"
    if spec.resources.gpus:
        amounts[spec.option("gpu-resource") or "nvidia.com/gpu"] = str(spec.resources.gpus)
    return k8s.ResourceRequirements(requests=amounts, limits=amounts)


def _metadata(spec: JobSpec) -> k8s.Metadata:
    return k8s.Metadata(name=spec.name, namespace=spec.option("namespace"), labels={_LABEL: spec.name})


def _namespace(spec: JobSpec) -> tuple[str, ...]:
    namespace = spec.option("namespace")
    return () if namespace is None else ("--namespace", namespace)


def _plural(spec: JobSpec) -> str:
    return _PLURALS[spec.option("kind") or "trainjob"]
