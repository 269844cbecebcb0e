"""Comet: offline, as an archive in the run's folder, unless a key is set."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from hearth.config.section import Section
from hearth.training.trackers.base import Artifact, EndStatus, Point, RunFacts, Tracker, flatten, numbers

_OFF = (
    "log_code",
    "log_graph",
    "parse_args",
    "log_git_metadata",
    "log_git_patch",
    "log_env_details",
    "log_env_gpu",
    "log_env_host",
    "log_env_cpu",
    "log_env_network",
    "log_env_disk",
    "auto_output_logging",
    "auto_param_logging",
    "auto_metric_logging",
    "auto_log_co2",
)


class CometOptions(Section):
    """``track.options.comet``."""

    project: str = Field("hearth", description="Project that gets the experiment.")
    workspace: str | None = Field(None, description="Comet workspace; default: that of the key.")
    mode: Literal["online", "offline"] | None = Field(
        None, description="Default: online where $COMET_API_KEY is set, else offline."
    )


class CometTracker(Tracker[CometOptions]):
    """The key of the experiment follows from the id of the run, so a resumed run continues it.

    Offline each process leaves an archive; `comet upload` of all of them, in order, gives one experiment.
    """

    name = "comet"
    libraries = ("comet_ml",)
    extra = "comet"
    options_class = CometOptions

    def start(self, facts: RunFacts) -> None:
        """Open the experiment, or continue it."""
        # Without this, importing comet_ml changes torch and prints to the terminal.
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
        os.environ.setdefault("COMET_LOGGING_CONSOLE", "WARNING")
        comet_ml: Any = importlib.import_module("comet_ml")

        online = self.options.mode == "online" or (
            self.options.mode is None and bool(os.environ.get("COMET_API_KEY"))
        )
        off: dict[str, Any] = dict.fromkeys(_OFF, False)
        config = comet_ml.ExperimentConfig(
            **off,
            display_summary_level=0,
            offline_directory=str(facts.folder / "comet"),
            name=facts.name,
            tags=[f"{key}={value}" for key, value in facts.tags.items()],
        )
        self._experiment: Any = comet_ml.start(
            online=online,
            mode="get_or_create",
            experiment_key=comet_ml.get_experiment_key(facts.run_id),
            project_name=self.options.project,
            workspace=self.options.workspace,
            experiment_config=config,
        )
        if not facts.resumed:
            self._experiment.log_parameters(flatten(facts.recipe))
            self._experiment.log_others({"run_id": facts.run_id, "recipe_hash": facts.recipe_hash})
            self._experiment.log_asset_data(facts.recipe_yaml, name="recipe.yaml")

    def log(self, points: Sequence[Point]) -> None:
        """Metrics with their step."""
        for point in points:
            for name, value in point.values.items():
                self._experiment.log_metric(name, value, step=point.step, include_context=False)

    def artifact(self, artifact: Artifact) -> None:
        """A remote asset: a reference that Comet does not fetch."""
        metadata = {**artifact.facts, "kind": artifact.kind}
        self._experiment.log_remote_asset(
            artifact.uri,
            remote_file_name=f"{artifact.kind}-{artifact.step}",
            metadata=metadata,
            step=artifact.step,
        )

    def finish(self, status: EndStatus, summary: Mapping[str, Any], error: str | None) -> None:
        """Summary, status and error beside the metrics."""
        others: dict[str, Any] = {f"summary/{key}": value for key, value in numbers(summary).items()}
        others["status"] = status
        if error is not None:
            others["error"] = error
        self._experiment.log_others(others)
        self._experiment.end()
