"""Runs a sweep: starts the worker processes, replaces those that die, and writes the results."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hearth.config import Recipe, recipe_hash, to_dict, to_yaml
from hearth.config.sweep import SweepSection, check_sweep, recipe_with, sweep_identity
from hearth.errors import HearthError, Interrupted, TrainingError
from hearth.training.signals import StopSignals
from hearth.training.sweep.plot import sweep_svg
from hearth.training.sweep.study import Sweep, Trial, load_optuna
from hearth.workspace import Run, Workspace

_POLL_SECONDS = 0.3
# So many trials that fail before any has finished, and the sweep is given up.
_HOPELESS = 3
_ENDED = ("finished", "pruned", "diverged", "failed")


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found."""

    name: str
    run: str
    folder: Path
    metric: str
    direction: str
    trials: list[Trial]
    best: Trial

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "sweep": self.name,
            "run": self.run,
            "folder": str(self.folder),
            "metric": self.metric,
            "direction": self.direction,
            "counts": dict(Counter(trial.state for trial in self.trials)),
            "best": self.best.as_dict(),
            "best_recipe": str(self.folder / "best.yaml"),
            "plot": str(self.folder / "plot.svg"),
            "trials": [trial.as_dict() for trial in self.trials],
        }


def run_sweep(
    recipe: Recipe,
    section: SweepSection,
    workspace: Workspace,
    *,
    name: str = "sweep",
    say: Callable[[str], None] = lambda _text: None,
) -> SweepResult:
    """Run the trials that are missing and return the results; the same call again goes on where it stopped.

    ``name`` is that of the recipe, for a sweep without one of its own. Raises ConfigError before anything is
    started, Interrupted after Ctrl-C (trials save a checkpoint and are taken up again), TrainingError when
    no trial finishes or the metric is never reported.
    """
    load_optuna()
    if getattr(recipe, "sweep", None) is not None:
        recipe = recipe.model_copy(update={"sweep": None})  # a trial is a job of its own
    check_sweep(section, recipe)
    identity = sweep_identity(section, recipe)
    folder = (workspace.root / "sweeps" / (section.name or f"{name}-{identity[:8]}")).absolute()
    sweep = Sweep.create(folder, section, recipe)
    run = _open_run(sweep, workspace)
    try:
        sweep.study.set_user_attr("stop", "")
        _Coordinator(sweep, workspace, say).run()
        result = _results(sweep, run)
    except (Interrupted, KeyboardInterrupt) as error:
        run.finish("interrupted", summary=_counts(sweep), error=str(error) or "interrupted")
        raise
    except BaseException as error:
        text = error.message if isinstance(error, HearthError) else f"{type(error).__name__}: {error}"
        run.finish("failed", summary=_counts(sweep), error=text.splitlines()[0])
        raise
    best = {"best_value": result.best.value, "best_trial": result.best.number, "best_run": result.best.run}
    run.finish("finished", summary={**_counts(sweep), **best, "metric": section.metric})
    return result


def _open_run(sweep: Sweep, workspace: Workspace) -> Run:
    """The run of the sweep itself; holding it keeps a second coordinator out."""
    file = sweep.folder / "run"
    if file.exists():
        return workspace.runs.resume(file.read_text(encoding="utf-8").strip())
    run = workspace.runs.create(
        "sweep",
        name=sweep.folder.name,
        recipe={**to_dict(sweep.recipe), "sweep": to_dict(sweep.section)},
        recipe_hash=recipe_hash(sweep.recipe),
        tags={"sweep": sweep.folder.name},
    )
    file.write_text(run.id + "\n", encoding="utf-8")
    return run


def _counts(sweep: Sweep) -> dict[str, Any]:
    return {"trials": dict(Counter(trial.state for trial in sweep.trials()))}


def _results(sweep: Sweep, run: Run) -> SweepResult:
    section, trials, best = sweep.section, sweep.trials(), sweep.best()
    (sweep.folder / "plot.svg").write_text(sweep_svg(sweep.folder.name, section, trials), encoding="utf-8")
    if best is None:
        counts = ", ".join(f"{count} {state}" for state, count in Counter(t.state for t in trials).items())
        errors = [f"trial {trial.number}: {trial.error}" for trial in trials if trial.error]
        raise TrainingError(
            f"no trial of sweep {sweep.folder.name} has finished ({counts or 'none began'})"
            + (f"; {errors[0]}" if errors else ""),
            fix=f"see {sweep.folder / 'logs'} and `hearth runs list`; narrow the ranges",
        )
    chosen = recipe_with(sweep.recipe, best.params)
    (sweep.folder / "best.yaml").write_text(to_yaml(chosen), encoding="utf-8")
    result = SweepResult(
        sweep.folder.name, run.id, sweep.folder, section.metric, section.direction, trials, best
    )
    content = json.dumps(result.as_dict(), indent=1)
    (sweep.folder / "results.json").write_text(content + "\n", encoding="utf-8")
    return result


def worker_environment(
    index: int, parallel: int, environ: Mapping[str, str], *, num_cores: int, num_gpus: int
) -> dict[str, str]:
    """What a worker process gets: its share of the cores, and where there are several GPUs one of them."""
    found = dict(environ)
    found.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // parallel)))
    given = environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(number) for number in range(num_gpus)] if given is None else given.split(",")
    if parallel > 1 and len(devices) > 1:
        found["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)].strip()
    return found


def _num_gpus() -> int:
    """Without torch, which the coordinator does not need."""
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


class _Coordinator:
    """The worker processes of one sweep."""

    def __init__(self, sweep: Sweep, workspace: Workspace, say: Callable[[str], None]) -> None:
        self._sweep, self._workspace, self._say = sweep, workspace, say
        self._stop: str | None = None
        timeout = sweep.section.timeout
        self._until = None if timeout is None else time.time() + timeout
        self._told = {trial.number for trial in sweep.trials() if trial.state in _ENDED}

    def run(self) -> None:
        section = self._sweep.section
        with self._sweep.lock():
            self._sweep.requeue_dead()
            left = self._sweep.any_left()
        self._announce()
        if not left:
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(StopSignals(self._on_signal))
            workers = {index: stack.enter_context(self._start(index)) for index in range(section.parallel)}
            try:
                self._watch(workers, stack)
            finally:
                self._end(workers)
        self._tell()
        if self._stop is not None:
            raise Interrupted(
                f"sweep {self._sweep.folder.name} stopped ({self._stop}); its trials have saved checkpoints",
                fix="go on with the same command",
            )
        reason = self._sweep.study.user_attrs.get("stop")
        if reason:
            raise TrainingError(reason, fix="correct the sweep; the runs of its trials are kept")

    def _announce(self) -> None:
        done, section = len(self._told), self._sweep.section
        start = f"going on after {done} trials, " if done else ""
        self._say(
            f"sweep {self._sweep.folder.name}: {start}{section.trials} trials of "
            f"{', '.join(section.parameters)}; {section.parallel} at a time, {section.sampler}"
        )

    def _on_signal(self, name: str) -> None:
        self._stop = name
        self._say(f"{name}: the trials finish their step and save")

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        logs = self._sweep.folder / "logs"
        logs.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "hearth.training.sweep.worker"]
        command += [str(self._sweep.folder), str(os.getpid())]
        if self._until is not None:
            command.append(repr(self._until))
        environment = worker_environment(
            index,
            self._sweep.section.parallel,
            {**os.environ, "HEARTH_HOME": str(self._workspace.root.absolute())},
            num_cores=os.cpu_count() or 1,
            num_gpus=_num_gpus(),
        )
        log: IO[bytes]
        with (logs / f"worker-{index}.log").open("ab") as log:
            # A session of its own: Ctrl-C reaches us alone, and we tell the workers.
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _watch(self, workers: dict[int, subprocess.Popen[bytes]], stack: contextlib.ExitStack) -> None:
        fruitless = 0
        while workers and self._stop is None:
            time.sleep(_POLL_SECONDS)
            fruitless = 0 if self._tell() else fruitless
            for index, process in list(workers.items()):
                if process.poll() is None:
                    continue
                del workers[index]
                if process.returncode == 0:
                    continue
                fruitless += 1
                if fruitless > _HOPELESS * self._sweep.section.parallel:
                    raise TrainingError(
                        f"the processes of sweep {self._sweep.folder.name} die one after the other; the last "
                        f"with {_exit_text(process.returncode)}: {self._last_line(index)}",
                        fix=f"see {self._sweep.folder / 'logs'}",
                    )
                self._say(
                    f"worker {index} died with {_exit_text(process.returncode)}; another takes its place"
                )
                with self._sweep.lock():
                    self._sweep.requeue_dead()
                workers[index] = stack.enter_context(self._start(index))

    def _end(self, workers: Mapping[int, subprocess.Popen[bytes]]) -> None:
        """Let the workers save and wait for them; a second signal ends them at once."""
        for process in workers.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        try:
            for process in workers.values():
                process.wait()
        except KeyboardInterrupt:
            for process in workers.values():
                process.kill()
            raise

    def _tell(self) -> bool:
        """Say what has ended since; True when something has. Gives up a sweep where everything fails."""
        trials = self._sweep.trials()
        fresh = [t for t in trials if t.state in _ENDED and t.number not in self._told]
        best = self._sweep.best() if fresh else None
        for trial in fresh:
            self._told.add(trial.number)
            value = "" if trial.value is None else f" {self._sweep.section.metric} {trial.value:.6g}"
            why = f" ({trial.error})" if trial.error else ""
            params = ", ".join(f"{key}={_short(item)}" for key, item in trial.params.items())
            beside = (
                f"; best {best.value:.6g} (trial {best.number})" if best and best.value is not None else ""
            )
            self._say(f"trial {trial.number} {trial.state}{value}{why}: {params}{beside}")
        failed = [trial for trial in trials if trial.state == "failed"]
        hopeful = any(trial.state in ("finished", "pruned", "diverged") for trial in trials)
        if len(failed) >= _HOPELESS and not hopeful and not self._sweep.study.user_attrs.get("stop"):
            reason = f"the first {len(failed)} trials failed; trial {failed[0].number}: {failed[0].error}"
            self._sweep.study.set_user_attr("stop", reason)
        return bool(fresh)

    def _last_line(self, index: int) -> str:
        text = (self._sweep.folder / "logs" / f"worker-{index}.log").read_text(errors="replace").strip()
        return text.splitlines()[-1] if text else "it printed nothing"


def _exit_text(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
