"""A process that takes trials until none is left: python -m hearth.training.sweep.worker FOLDER PARENT."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.config import Recipe
from hearth.config.recipe import RegisterSection
from hearth.config.sweep import recipe_with
from hearth.errors import HearthError, Interrupted, NonFiniteError, NotFoundError
from hearth.training.callbacks import Callback
from hearth.training.sweep.study import Sweep
from hearth.workspace import Workspace
from hearth.workspace.locks import file_lock

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer
    from hearth.workspace import Run


class TrialCallback(Callback):
    """Names the run of a trial, reports its metric, and stops it where the pruner says so.

    The pruner counts evaluations, not steps; a trial that is resumed counts on.
    """

    def __init__(self, trial: Any, metric: str) -> None:
        self._trial, self._metric = trial, metric
        self._last = -1
        self._best: float | None = None
        self.pruned = False

    def on_start(self, trainer: Trainer, run: Run) -> None:  # noqa: ARG002 - the signature of callbacks
        """Remember the run: whoever takes the trial up after us goes on with it."""
        self._trial.set_user_attr("run", run.id)

    def on_evaluate(self, trainer: Trainer, step: int, figures: Mapping[str, float]) -> None:
        """Report an evaluated metric, or the best value so far of one."""
        if self._metric in figures:
            self._report(trainer, step, figures[self._metric])
        name = self._metric.removeprefix("best_")
        if name != self._metric and name in figures:
            better = min if trainer.config.checkpoint.best_mode == "min" else max
            self._best = figures[name] if self._best is None else better(self._best, figures[name])
            self._report(trainer, step, self._best)

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, Any]) -> None:
        """Report a metric of the training steps when an evaluation is due."""
        every = trainer.config.train.evaluate_every
        value = metrics.get(self._metric, metrics.get("metrics", {}).get(self._metric))
        if value is not None and every and step % every == 0:
            self._report(trainer, step, float(value))

    def _report(self, trainer: Trainer, step: int, value: float) -> None:
        count = math.ceil(step / (trainer.config.train.evaluate_every or step))
        if count == self._last or not math.isfinite(value):
            return
        self._last = count
        self._trial.report(value, count)
        if self._trial.should_prune():
            self.pruned = True
            trainer.request_stop(f"the sweep prunes trial {self._trial.number}")


def metric_of(run: Run, metric: str) -> float | None:
    """The metric of a run that has ended: of its summary, else the last value of the series.

    There is no best of evaluations none of which was finite: the last of them says so.
    """
    value = run.summary.get(metric)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    points = run.metrics(metric) or run.metrics(metric.removeprefix("best_"))
    return points[-1].value if points else None


def trial_recipe(sweep: Sweep, number: int, params: dict[str, Any]) -> Recipe:
    """The recipe of one trial: tagged, and registering nothing. Raises ConfigError."""
    base = sweep.recipe
    tags = {**base.track.tags, "sweep": sweep.folder.name, "trial": str(number)}
    track = base.track.model_copy(update={"name": f"{sweep.folder.name}-{number:03d}", "tags": tags})
    quiet = base.model_copy(update={"track": track, "register_": RegisterSection.model_validate({})})
    return recipe_with(quiet, sweep.values(params))


class Worker:
    """Runs trials one after the other."""

    def __init__(self, sweep: Sweep, workspace: Workspace, *, until: float | None) -> None:
        self._sweep, self._workspace, self._until = sweep, workspace, until
        self._states: Any = sweep._optuna.trial.TrialState

    def run(self) -> None:
        """Until no trial is left, the time is over, or somebody stops us."""
        while self._until is None or time.time() < self._until:
            trial = self._sweep.ask()
            if trial is None:
                return
            print(f"trial {trial.number}: {self._sweep.values(trial.params)}", flush=True)  # noqa: T201 - its log
            if not self._run_trial(trial):
                return

    def _run_trial(self, trial: Any) -> bool:
        """False when this process should end."""
        study, began = self._sweep.study, time.monotonic()
        callback = TrialCallback(trial, self._sweep.section.metric)
        try:
            run = self._fit(trial, callback)
        except KeyboardInterrupt:
            self._sweep.requeue(trial)
            return False
        except Interrupted:
            if not callback.pruned:
                self._sweep.requeue(trial)
                return False
            trial.set_user_attr("seconds", time.monotonic() - began)
            study.tell(trial, state=self._states.PRUNED)
        except NonFiniteError as error:
            self._diverged(trial, error.message)
        except Exception as error:  # noqa: BLE001 - a trial that fails must not end the others
            traceback.print_exc()
            text = error.message if isinstance(error, HearthError) else f"{type(error).__name__}: {error}"
            trial.set_user_attr("error", text)
            study.tell(trial, state=self._states.FAIL)
        else:
            trial.set_user_attr("seconds", time.monotonic() - began)
            self._tell(trial, run)
        return True

    def _fit(self, trial: Any, callback: TrialCallback) -> Run:
        from hearth.training.trainer import Trainer

        recipe = trial_recipe(self._sweep, trial.number, trial.params)
        resume = self._resumable(trial.user_attrs.get("run"))
        # One at a time: the first prepares the data, the others find it.
        with file_lock(self._sweep.folder / "prepare.lock"):
            trainer = Trainer.from_recipe(
                recipe, workspace=self._workspace, resume=resume, progress=False, callbacks=[callback]
            )
        return trainer.fit()

    def _resumable(self, run_id: str | None) -> str | None:
        """The run of the trial's earlier process, where it has left a checkpoint."""
        if run_id is None:
            return None
        try:
            run = self._workspace.runs.get(run_id)
        except NotFoundError:
            return None
        return run.id if (run.dir / "latest").exists() else None

    def _tell(self, trial: Any, run: Run) -> None:
        value = metric_of(run, self._sweep.section.metric)
        if value is None:
            known = {key for key, item in run.summary.items() if isinstance(item, int | float)}
            known |= {point.name for point in run.metrics()}
            message = (
                f"sweep.metric {self._sweep.section.metric!r} was never reported by run {run.id}; it has "
                f"{', '.join(sorted(known))}"
            )
            trial.set_user_attr("error", message)
            self._sweep.study.set_user_attr("stop", message)
            self._sweep.study.tell(trial, state=self._states.FAIL)
        elif not math.isfinite(value):
            self._diverged(trial, f"{self._sweep.section.metric} is {value}")
        else:
            self._sweep.study.tell(trial, value)

    def _diverged(self, trial: Any, message: str) -> None:
        """Pruned, not failed: samplers learn from pruned trials that a region is bad, from failed nothing."""
        trial.set_user_attr("diverged", True)
        trial.set_user_attr("error", message)
        self._sweep.study.tell(trial, state=self._states.PRUNED)


def stop_with_parent(parent: int, *, every: float = 0.5, stop: Callable[[], None] | None = None) -> None:
    """Interrupt this process when ``parent`` is gone, so that a killed sweep leaves no worker behind."""

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        (stop or interrupt)()

    threading.Thread(target=watch, name="hearth-sweep-parent", daemon=True).start()


def main(arguments: list[str]) -> None:
    """FOLDER PARENT [UNTIL]: the sweep, the process that started us, and when to take no more trials."""
    folder, parent = Path(arguments[0]), int(arguments[1])
    until = float(arguments[2]) if len(arguments) > 2 else None
    stop_with_parent(parent)
    with Workspace.open() as workspace:
        try:
            Worker(Sweep.open(folder), workspace, until=until).run()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
