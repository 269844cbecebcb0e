"""Weights & Biases: offline, into the run's folder, unless a key or a server is set."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field

from hearth.config.section import Section
from hearth.training.trackers.base import Artifact, EndStatus, Point, RunFacts, Tracker, numbers

_INIT_SECONDS = 15.0


class WandbOptions(Section):
    """``track.options.wandb``."""

    project: str = Field("hearth", description="Project that gets the run.")
    entity: str | None = Field(None, description="User or team; default: that of the key.")
    group: str | None = Field(None, description="Group of the run.")
    mode: Literal["online", "offline"] | None = Field(
        None, description="Default: $WANDB_MODE, else online where $WANDB_API_KEY is set, else offline."
    )


def wandb_mode(option: str | None, environ: Mapping[str, str]) -> str:
    """Online only where the user has said so, by the option, the mode or a key."""
    return option or environ.get("WANDB_MODE") or ("online" if environ.get("WANDB_API_KEY") else "offline")


class WandbTracker(Tracker[WandbOptions]):
    """The W&B run has the id of the Hearth run. Steps are a metric of their own.

    W&B drops values of a step that it has passed; a resumed run, and system metrics, come with such steps.
    """

    name = "wandb"
    libraries = ("wandb",)
    extra = "wandb"
    options_class = WandbOptions

    def start(self, facts: RunFacts) -> None:
        """Open the run, or continue it."""
        mode = wandb_mode(self.options.mode, os.environ)
        wandb: Any = importlib.import_module("wandb")
        self._wandb = wandb
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            silent=True,
            x_disable_stats=True,  # Hearth samples the system itself
            # W&B would try for 90 seconds, and a process could not end meanwhile; the channel tries again.
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or _INIT_SECONDS),
        )
        self._run: Any = wandb.init(
            project=self.options.project,
            entity=self.options.entity,
            group=self.options.group,
            id=facts.run_id,
            name=facts.name,
            dir=str(facts.folder),
            config={**facts.recipe, "recipe_hash": facts.recipe_hash},
            tags=[f"{key}={value}"[:64] for key, value in facts.tags.items()],
            mode=mode,
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, points: Sequence[Point]) -> None:
        """Values beside their step."""
        for point in points:
            self._run.log({**point.values, "step": point.step})

    def artifact(self, artifact: Artifact) -> None:
        """A W&B artifact that refers to the files and holds none."""
        name = f"{self._run.id}-{artifact.kind}"
        metadata = {**artifact.facts, "step": artifact.step, "uri": artifact.uri}
        made = self._wandb.Artifact(name, type=artifact.kind, metadata=metadata)
        if Path(unquote(urlsplit(artifact.uri).path)).exists():  # a checkpoint may be pruned by now
            made.add_reference(artifact.uri, checksum=False)
        self._run.log_artifact(made)

    def finish(self, status: EndStatus, summary: Mapping[str, Any], error: str | None) -> None:
        """Summary, status and exit code."""
        self._run.summary.update({**numbers(summary), "status": status})
        if error is not None:
            self._run.summary["error"] = error
        self._run.finish(exit_code=0 if status == "finished" else 1)
