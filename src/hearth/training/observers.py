"""Everything that watches a run without being part of it: trackers, system metrics, callbacks, figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.training.callbacks import Callback, CallbackRunner
from hearth.training.performance import PerformanceCallback, ProfilerCallback
from hearth.training.system_metrics import SystemSampler
from hearth.training.trackers import Tracking, make_trackers, run_facts
from hearth.training.trackers.base import EndStatus

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer
    from hearth.workspace import Run, Workspace


def own_callbacks(trainer: Trainer) -> list[Callback]:
    """The callbacks that every run has, and those of the recipe. Raises ConfigError for a bad window."""
    found: list[Callback] = [PerformanceCallback()]
    window = trainer.config.train.profile_steps
    if window is not None:
        found.append(ProfilerCallback(*window, total_steps=trainer.total_steps))
    return found


class Observers:
    """Opened with the run, ended before its record is: figures go through here to all who want them."""

    def __init__(
        self, trainer: Trainer, run: Run, workspace: Workspace, *, warn: Callable[[str], None]
    ) -> None:
        self._trainer, self._run, self._warn = trainer, run, warn
        track = trainer.config.track
        self.callbacks = CallbackRunner([*trainer.callbacks, *own_callbacks(trainer)])
        self._callbacks_ended = False
        facts = run_facts(
            run,
            trainer.config,
            workspace=workspace.root,
            first_step=trainer.state.step,
            resumed=trainer._resume is not None,
        )
        trackers = make_trackers(track.trackers, track.options)
        self.tracking = trainer.tracking = Tracking(run, trackers, facts, warn=warn)
        self._sampler = SystemSampler(
            self._log_system, every=track.system_metrics_every, folder=run.dir, warn=warn
        ).__enter__()

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Record in the workspace and tell the trackers."""
        self.tracking.log_metrics(values, step=step)

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is on the disk."""
        self.tracking.artifact("checkpoint", path, step=step)
        self.callbacks.checkpoint(self._trainer, step, path)

    def end_callbacks(self, status: EndStatus) -> None:
        """Call ``on_end``. Raises CallbackError where the run would otherwise have finished."""
        if self._callbacks_ended:  # one raised there, and the run fails for it
            return
        self._callbacks_ended = True
        before = self.callbacks.error
        self.callbacks.end(self._trainer, self._run, status)
        if status == "finished":
            self.callbacks.raise_error()
        elif self.callbacks.error is not before:
            self._warn(str(self.callbacks.error))

    def end(self, status: EndStatus, summary: Mapping[str, Any], error: str | None = None) -> dict[str, Any]:
        """Close everything; the summary with what became of the trackers. The run's record is next."""
        if status != "finished":
            self.end_callbacks(status)
        self._sampler.__exit__(None, None, None)
        step = self._trainer.state.step
        for kind in ("model", "adapter"):
            folder = summary.get(f"{kind}_dir")
            if folder is not None:
                version = {"version": str(summary["version"])} if summary.get("version") else {}
                self.tracking.artifact(kind, Path(folder), step=step, **version)
        delivery = self.tracking.finish(status, {**self._run.summary, **summary}, error)
        return {**summary, "trackers": delivery} if delivery else dict(summary)

    def _log_system(self, values: Mapping[str, float]) -> None:
        self.log_metrics(values, step=self._trainer.state.step)
