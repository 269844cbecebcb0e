"""The study of a sweep on disk, shared by its processes.

sweeps/NAME/sweep.json    what varies, the recipe, the identity
sweeps/NAME/study.db      Optuna's study, in SQLite: a process that is killed leaves no torn record
sweeps/NAME/ask.lock      held while a trial is taken, so that no two processes take the last one
sweeps/NAME/logs/         what the worker processes print
sweeps/NAME/best.yaml, results.json, plot.svg
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from hearth.config import Recipe, to_dict
from hearth.config.sweep import SweepSection, sweep_identity
from hearth.errors import ConfigError, StorageError
from hearth.workspace.locks import file_lock
from hearth.workspace.processes import ProcessIdentity

# A trial whose process dies this often is not tried again: it may be what kills it.
MAX_DEATHS = 3


def load_optuna() -> Any:
    """The optuna package. Raises ConfigError that names the extra."""
    try:
        optuna: Any = importlib.import_module("optuna")
    except ImportError as error:
        raise ConfigError(
            "sweeps need optuna, which is not installed", fix="pip install 'hearth-lm[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class Trial:
    """One trial as people see it; params in the values of the recipe."""

    number: int
    state: str  # waiting, running, finished, pruned, diverged, failed
    params: dict[str, Any]
    value: float | None = None
    run: str | None = None
    seconds: float | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class Sweep:
    """A study and its settings, opened from its folder by the coordinator and by every worker."""

    def __init__(self, folder: Path, section: SweepSection, recipe: Recipe) -> None:
        self.folder, self.section, self.recipe = folder, section, recipe
        self._optuna = load_optuna()
        try:
            storage = self._optuna.storages.RDBStorage(
                f"sqlite:///{folder / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60.0}}
            )
            self.study: Any = self._optuna.create_study(
                storage=storage,
                study_name="sweep",
                direction=section.direction,
                load_if_exists=True,
                sampler=self._sampler(0),
                pruner=self._pruner(),
            )
        except (self._optuna.exceptions.OptunaError, SQLAlchemyError, OSError) as error:
            raise StorageError(f"the study in {folder} cannot be opened: {error}") from error

    @classmethod
    def create(cls, folder: Path, section: SweepSection, recipe: Recipe) -> Sweep:
        """Make the folder, or take up the one that is there.

        Raises ConfigError when another sweep has this name.
        """
        identity = sweep_identity(section, recipe)
        file = folder / "sweep.json"
        if file.exists() and json.loads(file.read_text(encoding="utf-8"))["identity"] != identity:
            raise ConfigError(
                f"{folder.name} is a sweep of another recipe or of other parameters",
                fix="give this one another sweep.name",
            )
        folder.mkdir(parents=True, exist_ok=True)
        content = {"identity": identity, "sweep": to_dict(section), "recipe": to_dict(recipe)}
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)
        sweep = cls(folder, section, recipe)
        with sweep.lock():
            sweep._enqueue_grid()
        return sweep

    @classmethod
    def open(cls, folder: Path) -> Sweep:
        """The sweep of an existing folder."""
        content = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        section = SweepSection.model_validate_json(json.dumps(content["sweep"]), strict=True, by_alias=True)
        recipe = Recipe.model_validate_json(json.dumps(content["recipe"]), strict=True, by_alias=True)
        return cls(folder, section, recipe)

    def lock(self) -> Any:
        """Held by one process at a time, as long as it lives."""
        return file_lock(self.folder / "ask.lock")

    # ── taking trials ────────────────────────────────────────────────────────────────────────────────────

    def ask(self) -> Any:
        """The next trial, owned by this process; None when there is none left.

        A trial whose process died comes first. The choice follows from the seed and the trials so far.
        """
        with self.lock():
            self.requeue_dead()
            trials = self.study.get_trials(deepcopy=False)
            if self.study.user_attrs.get("stop") or not self._any_left(trials):
                return None
            self.study.sampler = self._sampler(len(trials))
            trial = self.study.ask(self._distributions())
            trial.set_user_attr("owner", asdict(ProcessIdentity.current()))
            trial.set_user_attr("began", time.time())
            return trial

    def requeue(self, trial: Any) -> None:
        """Put a trial of this process back, for another process or another day."""
        with self.lock():
            self._put_back(self.study.get_trials(deepcopy=False)[trial.number])

    def requeue_dead(self) -> None:
        """Put back the trials whose processes are gone. The caller holds the lock."""
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name != "RUNNING":
                continue
            # Without an owner: it died between taking the trial and signing it, or it would hold the lock.
            owner = trial.user_attrs.get("owner")
            now = datetime.now(UTC)
            if owner is None or not ProcessIdentity(**owner).is_alive(now, now):
                self._put_back(trial, died=True)

    def _put_back(self, trial: Any, *, died: bool = False) -> None:
        kept = {key: value for key, value in trial.user_attrs.items() if key in ("run", "grid")}
        deaths = int(trial.user_attrs.get("deaths", 0)) + died
        replaced = any(
            other.user_attrs.get("retry_of") == trial.number
            for other in self.study.get_trials(deepcopy=False)
        )
        if deaths < MAX_DEATHS and not replaced:
            attributes = {**kept, "retry_of": trial.number, "deaths": deaths}
            self.study.add_trial(
                self._optuna.create_trial(
                    state=self._optuna.trial.TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs=attributes,
                    system_attrs=dict(trial.system_attrs),
                )
            )
        # After the copy: killed in between, it is found again and has its copy already.
        self.study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def any_left(self) -> bool:
        """Whether a trial waits or is still to be chosen."""
        return self._any_left(self.study.get_trials(deepcopy=False))

    def _any_left(self, trials: Sequence[Any]) -> bool:
        if any(trial.state.name == "WAITING" for trial in trials):
            return True
        if self.section.sampler == "grid":
            return False
        replaced = self._replaced(trials)
        return len([trial for trial in trials if trial.number not in replaced]) < self.section.trials

    @staticmethod
    def _replaced(trials: Sequence[Any]) -> set[int]:
        return {trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs}

    def _enqueue_grid(self) -> None:
        if self.section.sampler != "grid":
            return
        there = {trial.user_attrs.get("grid") for trial in self.study.get_trials(deepcopy=False)}
        for index, values in enumerate(self.section.grid()):
            if index < self.section.trials and index not in there:
                encoded = {key: self._encode(key, value) for key, value in values.items()}
                self.study.enqueue_trial(encoded, user_attrs={"grid": index})

    # ── values ───────────────────────────────────────────────────────────────────────────────────────────

    def _distributions(self) -> dict[str, Any]:
        made, kinds = {}, self._optuna.distributions
        for key, parameter in self.section.parameters.items():
            values, step = parameter.range(), parameter.step
            assert values is not None
            if parameter.kind == "choice":
                # As JSON: Optuna stores no lists, and takes 1 and True for the same.
                made[key] = kinds.CategoricalDistribution([json.dumps(value) for value in values])
            elif parameter.kind == "int":
                high = values[0] + (values[1] - values[0]) // int(step or 1) * int(step or 1)
                made[key] = kinds.IntDistribution(values[0], high, step=int(step or 1))
            else:
                grid = parameter.grid()
                high = values[1] if grid is None else grid[-1]
                made[key] = kinds.FloatDistribution(values[0], high, log=parameter.kind == "log", step=step)
        return made

    def _encode(self, key: str, value: Any) -> Any:
        return json.dumps(value) if self.section.parameters[key].kind == "choice" else value

    def values(self, params: dict[str, Any]) -> dict[str, Any]:
        """Optuna's parameters as values of the recipe."""
        return {
            key: json.loads(value) if self.section.parameters[key].kind == "choice" else value
            for key, value in params.items()
        }

    def _sampler(self, num_trials: int) -> Any:
        """A new one for each trial: its random state would else be lost with the process, and repeat."""
        seed = self.section.seed * 1_000_003 + num_trials
        if self.section.sampler == "tpe":
            return self._optuna.samplers.TPESampler(seed=seed)
        return self._optuna.samplers.RandomSampler(seed=seed)

    def _pruner(self) -> Any:
        return {
            "none": self._optuna.pruners.NopPruner,
            "median": self._optuna.pruners.MedianPruner,
            "hyperband": self._optuna.pruners.HyperbandPruner,
        }[self.section.pruner]()

    # ── results ──────────────────────────────────────────────────────────────────────────────────────────

    def trials(self) -> list[Trial]:
        """All trials in order; a dead one that was put back is shown as its successor only."""
        trials = self.study.get_trials(deepcopy=False)
        replaced = self._replaced(trials)
        return [self._shown(trial) for trial in trials if trial.number not in replaced]

    def best(self) -> Trial | None:
        """The best of the finished trials."""
        finished = [t for t in self.trials() if t.state == "finished" and t.value is not None]
        sign = 1.0 if self.section.direction == "minimize" else -1.0
        return min(finished, key=lambda t: sign * (t.value or 0.0), default=None)

    def _shown(self, trial: Any) -> Trial:
        attributes = trial.user_attrs
        state = {"COMPLETE": "finished", "FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
        if attributes.get("diverged"):
            state = "diverged"
        error = attributes.get("error")
        if state == "failed" and error is None:
            error = f"its process died {MAX_DEATHS} times"
        values = trial.values if trial.state.name in ("COMPLETE", "PRUNED") else None
        return Trial(
            number=trial.number,
            state=state,
            params=self.values(trial.params),
            value=None if not values or state == "diverged" else float(values[0]),
            run=attributes.get("run"),
            seconds=attributes.get("seconds"),
            error=error,
        )
