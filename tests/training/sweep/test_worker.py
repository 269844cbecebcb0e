"""Trials as they go: finished, pruned, diverged, failed, interrupted, and taken up again."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from hearth.errors import TrainingError
from hearth.training import Trainer
from hearth.training.sweep import Sweep
from hearth.training.sweep import worker as worker_module
from hearth.training.sweep.coordinator import _results, run_sweep, worker_environment
from hearth.training.sweep.plot import sweep_svg
from hearth.training.sweep.worker import Worker
from hearth.workspace import Workspace

MakeSweep = Callable[..., Sweep]


def work(sweep: Sweep, workspace: Workspace) -> list[Any]:
    Worker(sweep, workspace, until=None).run()
    return sweep.trials()


def rates(*values: float) -> dict[str, Any]:
    """A grid of learning rates, in this order."""
    return {
        "parameters": {"train.learning_rate": {"choice": list(values)}},
        "sampler": "grid",
        "trials": len(values),
    }


def test_every_trial_is_a_run(make_sweep: MakeSweep, workspace: Workspace) -> None:
    sweep = make_sweep(
        **rates(1e-2, 1e-4),
        recipe={"track": {"tags": {"team": "blue"}}, "register": {"name": "none-of-them"}},
    )
    trials = work(sweep, workspace)
    assert [trial.state for trial in trials] == ["finished", "finished"]
    for trial in trials:
        run = workspace.runs.get(trial.run)
        assert run.status == "finished"
        assert run.tags == {"team": "blue", "sweep": "sweep", "trial": str(trial.number)}
        assert run.recipe["train"]["learning_rate"] == trial.params["train.learning_rate"]
        assert run.summary["eval_loss"] == trial.value
    assert sweep.best().number == 0
    assert workspace.registry.list() == []


def test_bad_trials_are_pruned_at_an_evaluation(make_sweep: MakeSweep, workspace: Workspace) -> None:
    sweep = make_sweep(
        **rates(1e-2, 1e-2 * 1.1, 1e-2 * 1.2, 1e-2 * 1.3, 1e-2 * 1.4, 1e-7, 2e-2),
        recipe={"train": {"steps": 6, "evaluate_every": 2}},
        pruner="median",
    )
    trials = work(sweep, workspace)
    assert [trial.state for trial in trials] == ["finished"] * 5 + ["pruned", "finished"]
    assert list(sweep.study.trials[0].intermediate_values) == [1, 2, 3]
    run = workspace.runs.get(trials[5].run)
    assert run.status == "interrupted"
    assert "the sweep prunes trial 5" in run.error
    assert run.summary["steps"] == 2
    assert trials[5].value == run.metrics("eval_loss")[-1].value


def test_a_loss_that_is_not_finite_is_a_result(
    make_sweep: MakeSweep, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.compute_loss

    def steep(self: Trainer, model: Any, batch: Any) -> Any:
        found = original(self, model, batch)
        if self.config.train.learning_rate > 1 and model.training:
            found.sums["tokens"] = found.sums["tokens"] * float("nan")
        return found

    monkeypatch.setattr(Trainer, "compute_loss", steep)
    sweep = make_sweep(**rates(5.0, 1e-2))
    trials = work(sweep, workspace)
    assert [trial.state for trial in trials] == ["diverged", "finished"]
    assert trials[0].value is None
    assert "loss nan in step 1" in trials[0].error
    assert "trial 0, diverged" not in sweep_svg("s", sweep.section, trials)
    assert "trial 1, finished" in sweep_svg("s", sweep.section, trials)


@pytest.mark.parametrize("metric", ["eval_loss", "best_eval_loss"])
def test_evaluations_that_are_never_finite_are_a_result(
    make_sweep: MakeSweep, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    def evaluate(self: Trainer) -> dict[str, float]:
        return {"eval_loss": math.inf if self.config.train.learning_rate > 1e-2 else 1.0}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    trials = work(make_sweep(**rates(2e-2, 1e-3), metric=metric), workspace)
    assert [(trial.state, trial.value) for trial in trials] == [("diverged", None), ("finished", 1.0)]
    assert trials[0].error == f"{metric} is inf"


def test_a_trial_whose_recipe_cannot_be_fails_alone(make_sweep: MakeSweep, workspace: Workspace) -> None:
    parameters = {"train.batch_size": {"choice": [4, 6]}, "train.micro_batch_size": {"choice": [4, 2]}}
    sweep = make_sweep(parameters=parameters, sampler="grid", trials=4)
    trials = work(sweep, workspace)
    assert [trial.state for trial in trials] == ["finished", "finished", "failed", "finished"]
    assert "batch_size 6 is not a multiple of micro_batch_size 4" in trials[2].error


def test_a_metric_that_is_never_reported(make_sweep: MakeSweep, workspace: Workspace) -> None:
    sweep = make_sweep(**rates(1e-2, 1e-3), metric="eval_los")
    trials = work(sweep, workspace)
    assert [trial.state for trial in trials] == ["failed", "waiting"]  # one is enough to know
    assert "sweep.metric 'eval_los' was never reported" in trials[0].error
    assert "eval_loss" in trials[0].error
    run = workspace.runs.create("sweep", name="s")
    with pytest.raises(
        TrainingError, match=r"no trial of sweep sweep has finished \(1 failed, 1 waiting\); trial 0"
    ):
        _results(sweep, run)


def test_an_interrupted_trial_goes_on_from_its_checkpoint(
    make_sweep: MakeSweep, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {**rates(1e-2), "recipe": {"train": {"steps": 8, "evaluate_every": 2}}}
    straight = work(make_sweep(folder="straight", **options), workspace)[0]

    original = worker_module.TrialCallback.on_step

    def stop(self: Any, trainer: Trainer, step: int, metrics: Any) -> None:
        original(self, trainer, step, metrics)
        if step == 3:
            trainer.request_stop("SIGINT")

    monkeypatch.setattr(worker_module.TrialCallback, "on_step", stop)
    sweep = make_sweep(**options)
    assert [trial.state for trial in work(sweep, workspace)] == ["waiting"]
    monkeypatch.undo()
    (trial,) = work(make_sweep(**options), workspace)
    assert trial.state == "finished"
    assert trial.value == straight.value  # bit for bit the run that was not interrupted
    run = workspace.runs.get(trial.run)
    assert [point.step for point in run.metrics("loss")] == list(range(1, 9))
    assert len(workspace.runs.list(kind="train")) == 2


def test_no_trial_begins_after_the_time(make_sweep: MakeSweep, workspace: Workspace) -> None:
    sweep = make_sweep()
    Worker(sweep, workspace, until=time.time() - 1).run()
    assert sweep.trials() == []


def test_cores_and_gpus_are_shared_out() -> None:
    def share(index: int, **environ: str) -> dict[str, str]:
        return worker_environment(index, 3, environ, num_cores=8, num_gpus=2)

    assert share(0) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0"}
    assert share(1)["CUDA_VISIBLE_DEVICES"] == "1"
    assert share(2)["CUDA_VISIBLE_DEVICES"] == "0"
    assert share(1, CUDA_VISIBLE_DEVICES="5,7", OMP_NUM_THREADS="1") == {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "7",
    }
    assert share(1, CUDA_VISIBLE_DEVICES="")["CUDA_VISIBLE_DEVICES"] == ""


def test_a_worker_notices_that_its_parent_is_gone() -> None:
    gone = threading.Event()
    worker_module.stop_with_parent(os.getppid() + 1_000_000, every=0.01, stop=gone.set)
    assert gone.wait(5)
    still = threading.Event()
    worker_module.stop_with_parent(os.getppid(), every=0.01, stop=still.set)
    assert not still.wait(0.1)


def test_a_whole_sweep_in_processes(make_sweep: MakeSweep, workspace: Workspace) -> None:
    sweep = make_sweep(**rates(1e-2, 1e-3, 3e-2), parallel=2, name="mine")
    said: list[str] = []
    result = run_sweep(sweep.recipe, sweep.section, workspace, say=said.append)
    assert [trial.state for trial in result.trials] == ["finished"] * 3
    assert result.best.value == min(trial.value for trial in result.trials)
    run = workspace.runs.get(result.run)
    assert (run.kind, run.status) == ("sweep", "finished")
    assert run.summary["best_trial"] == result.best.number
    assert len([line for line in said if " finished eval_loss " in line]) == 3
    # The best recipe trains to the very same value.
    from hearth.config import Recipe

    best = Recipe.load(result.folder / "best.yaml")
    again = Trainer.from_recipe(best, workspace=workspace, progress=False, device="cpu").fit()
    assert again.summary["eval_loss"] == pytest.approx(result.best.value, rel=1e-4)
    # Once more: nothing is left to do, and the results are the same.
    count = len(workspace.runs.list())
    assert run_sweep(sweep.recipe, sweep.section, workspace).as_dict() == result.as_dict()
    assert len(workspace.runs.list()) == count


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_with_all_its_processes_it_goes_on(make_sweep: MakeSweep, workspace: Workspace) -> None:
    """kill -9 of coordinator and worker in the middle of a trial, twice: no finished trial is repeated."""
    rows = [1e-2, 2e-2, 3e-2, 4e-2]
    made = make_sweep(
        **rates(*rows),
        name="killed",
        recipe={"train": {"steps": 100, "evaluate_every": 50}, "checkpoint": {"every": 25}},
    )
    folder = workspace.root.absolute() / "sweeps" / "killed"
    code = (
        "from hearth.training.sweep import Sweep, run_sweep\nfrom hearth.workspace import Workspace\n"
        f"s = Sweep.open(__import__('pathlib').Path({str(made.folder)!r}))\n"
        "with Workspace.open() as w: run_sweep(s.recipe, s.section, w)"
    )

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "HEARTH_HOME": str(workspace.root)}
        )

    import psutil

    finished: list[int] = []
    watched: Sweep | None = None
    for wanted in (1, 2):
        process = start()
        until = time.monotonic() + 240
        while time.monotonic() < until:
            time.sleep(0.3)
            watched = watched or (Sweep.open(folder) if (folder / "run").exists() else None)
            trials = watched.trials() if watched else []
            running = [t for t in trials if t.state == "running" and t.run]
            if sum(t.state == "finished" for t in trials) >= wanted and running:
                break
        else:
            pytest.fail("the sweep did not come so far")
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()
        finished.append(sum(t.state == "finished" for t in Sweep.open(folder).trials()))
    assert start().wait(300) == 0
    trials = Sweep.open(folder).trials()
    assert [trial.state for trial in trials] == ["finished"] * 4
    assert sorted(trial.params["train.learning_rate"] for trial in trials) == rows
    runs = workspace.runs.list(kind="train")
    assert len({trial.run for trial in trials}) == 4
    assert len(runs) <= 6  # at most the two that died before their first checkpoint began anew
    assert finished[0] >= 1


@pytest.mark.slow
def test_without_its_coordinator_a_worker_stops_and_its_trial_goes_on(
    make_sweep: MakeSweep, workspace: Workspace
) -> None:
    sweep = make_sweep(**rates(1e-2), recipe={"train": {"steps": 2000}})
    code = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-m', 'hearth.training.sweep.worker', sys.argv[1], str(os.getpid())]\n"
        "child = subprocess.Popen(command, start_new_session=True)\n"
        "child.wait()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(sweep.folder)],
        env={**os.environ, "HEARTH_HOME": str(workspace.root)},
    )
    until = time.monotonic() + 120
    while not any(t.run for t in sweep.trials()) and time.monotonic() < until:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while sweep.trials()[0].state == "running" and time.monotonic() < until:
        time.sleep(0.1)
    (trial,) = sweep.trials()
    assert trial.state == "waiting"
    run = workspace.runs.get(trial.run)
    assert run.status == "interrupted"
    assert (run.dir / "latest").is_file()
