"""MLflow: a server, or a database in the workspace."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from hearth.config.section import Section
from hearth.training.trackers.base import Artifact, EndStatus, Point, RunFacts, Tracker, flatten, numbers

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
# Limits of MLflow's log-batch call and of a parameter's value.
_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_CHARS = 1000, 100, 6000
_RUN_TAG = "hearth.run_id"


class MlflowOptions(Section):
    """``track.options.mlflow``."""

    tracking_uri: str | None = Field(
        None, description="Default: $MLFLOW_TRACKING_URI, else mlflow.db in the workspace."
    )
    experiment: str = Field("hearth", description="Experiment that gets the run.")

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password is not None:
            raise ValueError(
                "holds a password, which the recipe would take to the run's record and to every tracker: "
                "set $MLFLOW_TRACKING_URI instead"
            )
        return uri


class MlflowTracker(Tracker[MlflowOptions]):
    """Writes through a client of its own; MLflow's global active run stays as it is."""

    name = "mlflow"
    libraries = ("mlflow",)
    extra = "mlflow"
    options_class = MlflowOptions

    def start(self, facts: RunFacts) -> None:
        """Find the run by its Hearth id or create it; log the recipe as parameters and as a file."""
        # MLflow would try seven times for two minutes each; the channel tries again anyway.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        mlflow: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        given = self.options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._client: Any = mlflow.MlflowClient(
            tracking_uri=given or f"sqlite:///{facts.workspace / 'mlflow.db'}"
        )
        # Beside the database: MLflow's own default for it is the current directory.
        location = None if given else (facts.workspace / "mlflow-artifacts").absolute().as_uri()
        experiment = self._experiment(location)
        found = self._client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{facts.run_id}'", max_results=1)
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        tags = {_RUN_TAG: facts.run_id, "hearth.recipe_hash": facts.recipe_hash, **facts.tags}
        run = self._client.create_run(experiment, run_name=facts.name, tags=tags)
        self._run_id = run.info.run_id
        self._log_recipe(facts)

    def _experiment(self, location: str | None) -> str:
        exceptions: Any = importlib.import_module("mlflow.exceptions")
        name = self.options.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=location))
            except exceptions.MlflowException:  # another trial of a sweep was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _log_recipe(self, facts: RunFacts) -> None:
        params = [
            self._entities.Param(
                key, (value if isinstance(value, str) else json.dumps(value))[:_MAX_PARAM_CHARS]
            )
            for key, value in flatten(facts.recipe).items()
        ]
        for first in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params[first : first + _MAX_PARAMS])
        self._client.log_text(self._run_id, facts.recipe_yaml, "recipe.yaml")

    def log(self, points: Sequence[Point]) -> None:
        """Metrics with their step and time, in batches."""
        metrics = [
            self._entities.Metric(name, value, int(point.time * 1000), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for first in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + _MAX_METRICS])

    def artifact(self, artifact: Artifact) -> None:
        """A tag with the reference; the newest of a kind counts."""
        self._client.set_tag(self._run_id, f"hearth.{artifact.kind}", artifact.uri)
        for key, value in artifact.facts.items():
            self._client.set_tag(self._run_id, f"hearth.{artifact.kind}.{key}", value)

    def finish(self, status: EndStatus, summary: Mapping[str, Any], error: str | None) -> None:
        """The summary's numbers as metrics, error and status."""
        now = int(time.time() * 1000)
        values = numbers(summary)
        metrics = [self._entities.Metric(f"summary/{key}", value, now, 0) for key, value in values.items()]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)
        if error is not None:
            self._client.set_tag(self._run_id, "hearth.error", error[:_MAX_PARAM_CHARS])
        self._client.set_terminated(self._run_id, status=_STATUS[status])
