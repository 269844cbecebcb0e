"""`--on azureml`: a command job of Azure ML with its PyTorch distribution."""

from __future__ import annotations

import importlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from hearth.errors import ConfigError, TrainingError
from hearth.parallel.launch.backend import JobStatus, Submitted, Watch
from hearth.parallel.launch.jobs import Job
from hearth.parallel.launch.local import require_recipe
from hearth.parallel.launch.spec import JobSpec, Rendered, State
from hearth.parallel.launch.torchrun import MODULE

_FILE = "job.yml"
_SCHEMA = "https://azuremlschemas.azureedge.net/latest/commandJob.schema.json"
_INSTALL = "pip install 'hearth-lm[azureml]'"
_PLAIN_WORD = re.compile(r"[\w.,:/@%+=-]+")
_STATES: Mapping[str, State] = {
    "NotStarted": "pending",
    "Queued": "pending",
    "Preparing": "pending",
    "Provisioning": "pending",
    "Starting": "pending",
    "Running": "running",
    "Finalizing": "running",
    "CancelRequested": "running",
    "Completed": "finished",
    "Failed": "failed",
    "NotResponding": "failed",
    "Canceled": "cancelled",
}


class AzureBackend:
    """A job specification, checked by azure-ai-ml's own loaders and submitted with them."""

    name: ClassVar[str] = "azureml"
    UNUSED: ClassVar[frozenset[str]] = frozenset(("--cpus-per-node", "--memory-per-node", "--no-requeue"))
    # Azure puts the path of the mounted folder in the place of this.
    WORKSPACE: ClassVar[str | None] = "${{outputs.workspace}}"
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "compute": "name of the compute cluster (gpu-cluster)",
        "environment": "a registered environment, name@latest or name:3, instead of --image",
        "datastore": "datastore that holds the workspace (workspaceblobstore)",
        "experiment": "name of the experiment (hearth)",
        "shm-size": "shared memory of a container (16g)",
        "config": "config.json of the Azure ML workspace, for submitting (found upwards from here)",
    }

    def render(self, spec: JobSpec) -> Rendered:
        """The job's YAML, and the recipe beside it, which is uploaded as the job's code."""
        import yaml

        document = self._document(spec)
        files = {_FILE: yaml.safe_dump(document, sort_keys=False, width=110)}
        if spec.recipe is not None:
            files[_recipe_name(spec)] = Path(spec.recipe).read_text(encoding="utf-8")
        return Rendered(files, (("az", "ml", "job", "create", "--file", _FILE),))

    def validate(self, spec: JobSpec, rendered: Rendered) -> list[str]:
        """By azure-ai-ml, where it is installed: its schema and the validation of the loaded job."""
        checked = require_recipe(spec)
        try:
            with tempfile.TemporaryDirectory() as folder:
                _load_job(Path(folder), rendered)
        except ImportError:
            return [*checked, f"{_INSTALL} checks the job too, which was not"]
        return [*checked, "azure-ai-ml loads and validates the job"]

    def submit(self, spec: JobSpec, rendered: Rendered, watch: Watch) -> Submitted:  # noqa: ARG002
        """Create the job; returns at once."""
        client = _client(spec)
        with tempfile.TemporaryDirectory() as folder:
            created = _answer(lambda: client.jobs.create_or_update(_load_job(Path(folder), rendered)))
        return Submitted({"azure_job": created.name, "url": str(created.studio_url)})

    def status(self, job: Job) -> JobStatus:
        """Of the job in Azure."""
        name, client = job.require_handle("azure_job"), _client(job.spec)
        word = str(_answer(lambda: client.jobs.get(name)).status)
        return JobStatus(_STATES.get(word, "unknown"), f"Azure ML job {name}: {word}")

    def logs(self, job: Job) -> Iterator[str]:
        """All that Azure has collected, downloaded first."""
        name, client = job.require_handle("azure_job"), _client(job.spec)
        with tempfile.TemporaryDirectory() as folder:
            _answer(lambda: client.jobs.download(name, download_path=folder, all=False))
            for path in sorted(Path(folder).rglob("*.txt")):
                yield f"── {path.relative_to(folder)} ──"
                yield from path.read_text(encoding="utf-8", errors="replace").splitlines()

    def cancel(self, job: Job) -> str:
        """Ask Azure to end it."""
        name, client = job.require_handle("azure_job"), _client(job.spec)
        _answer(lambda: client.jobs.begin_cancel(name))
        return f"asked Azure ML to end job {name}"

    def _document(self, spec: JobSpec) -> dict[str, Any]:
        environment = spec.option("environment")
        if (environment is None) == (spec.image is None):
            raise ConfigError(
                "--on azureml needs an environment with Hearth in it",
                fix="give either --image REGISTRY/NAME:TAG or --option environment=NAME@latest",
            )
        variables = spec.variables()
        # Paths that Azure fills in are possible in the command alone.
        filled = {name: value for name, value in variables.items() if "${{" in value}
        resources: dict[str, Any] = {
            "instance_count": spec.nodes,
            "shm_size": spec.option("shm-size") or "16g",
        }
        document: dict[str, Any] = {
            "$schema": _SCHEMA,
            "type": "command",
            "name": spec.name,
            "display_name": spec.name,
            "experiment_name": spec.option("experiment") or "hearth",
            "command": " ".join([*(f"{k}={v}" for k, v in filled.items()), *self._command(spec)]),
            "code": ".",
            "environment": f"azureml:{environment}" if environment else {"image": spec.image},
            "compute": f"azureml:{spec.option('compute') or 'gpu-cluster'}",
            "distribution": {"type": "pytorch", "process_count_per_instance": spec.processes},
            "resources": resources,
            "environment_variables": {k: v for k, v in variables.items() if k not in filled},
            "outputs": {
                "workspace": {
                    "type": "uri_folder",
                    "mode": "rw_mount",
                    # A path of its own, not one of the job: the next job goes on with this one's runs.
                    "path": f"azureml://datastores/{spec.option('datastore') or 'workspaceblobstore'}"
                    "/paths/hearth",
                }
            },
        }
        if spec.time_limit is not None:
            document["limits"] = {"timeout": spec.time_limit}
        return document

    def _command(self, spec: JobSpec) -> list[str]:
        """Azure starts a process for each rank itself, with torchrun's variables."""
        words = [_recipe_name(spec) if word == spec.recipe else word for word in spec.arguments()]
        if bad := [word for word in words if not _PLAIN_WORD.fullmatch(word)]:
            raise ConfigError(
                f"{bad[0]!r} cannot be part of the command of an Azure ML job",
                fix="write the value into the recipe",
            )
        return ["python", "-m", MODULE, *words]


def _recipe_name(spec: JobSpec) -> str:
    """Not the user's own, which may be that of the job's file, or have spaces in it."""
    assert spec.recipe is not None
    return f"recipe{Path(spec.recipe).suffix}"


def _load_job(folder: Path, rendered: Rendered) -> Any:
    """The job as azure-ai-ml sees it. Raises ConfigError for what it refuses, ImportError without it."""
    logger = logging.getLogger("azure.ai.ml")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of each experimental class that it defines
    try:
        load_job = importlib.import_module("azure.ai.ml").load_job
        refused = importlib.import_module("marshmallow.exceptions").ValidationError
        for name, text in rendered.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        try:
            job = load_job(folder / _FILE)
        except refused as error:
            raise ConfigError(f"Azure ML does not take the job: {_first_message(str(error))}") from error
        result = job._validate()  # the loader's own check, which its command line runs, too
        if not result.passed:
            raise ConfigError(f"Azure ML does not take the job: {result.error_messages}")
        return job
    finally:
        logger.setLevel(level)


def _first_message(text: str) -> str:
    """Of a long report, the field and what is wrong with it."""
    found = re.search(r'\\?"(\w+)\\?": \[(?:\\n|\s)*\\?"([^"\\]+)', text)
    return f"{found.group(1)}: {found.group(2)}" if found else text.splitlines()[0]


def _client(spec: JobSpec) -> Any:
    try:
        client = importlib.import_module("azure.ai.ml").MLClient
        credential = importlib.import_module("azure.identity").DefaultAzureCredential
    except ImportError as error:
        raise ConfigError(f"--on azureml needs {error.name}", fix=_INSTALL) from error
    return _answer(lambda: client.from_config(credential(), path=spec.option("config")))


def _answer(call: Any) -> Any:
    """What Azure answers. Raises TrainingError with its words."""
    known = (
        importlib.import_module("azure.ai.ml.exceptions").MlException,
        importlib.import_module("azure.core.exceptions").AzureError,
        OSError,
    )
    try:
        return call()
    except known as error:
        words = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"Azure ML: {words}",
            fix="sign in with `az login`, and download config.json of the Azure ML workspace",
        ) from error
