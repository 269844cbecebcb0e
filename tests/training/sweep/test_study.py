"""The study on disk: who takes which trial, what a dead process leaves, what a second one finds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from hearth.errors import ConfigError, StorageError
from hearth.training.sweep.study import MAX_DEATHS, Sweep, load_optuna
from hearth.workspace.processes import ProcessIdentity

MakeSweep = Callable[..., Sweep]


def dead_owner() -> dict[str, Any]:
    """A process of this machine that is gone."""
    code = (
        "import json; from dataclasses import asdict; from hearth.workspace.processes import ProcessIdentity;"
        "print(json.dumps(asdict(ProcessIdentity.current())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_more_trials_than_asked_for_and_none_twice(make_sweep: MakeSweep) -> None:
    first, second = make_sweep(), make_sweep()  # two processes open the same folder
    taken = [sweep.ask() for sweep in (first, second, first)]
    assert len({trial.params["train.learning_rate"] for trial in taken}) == 3
    assert second.ask() is None
    for trial in taken:
        first.study.tell(trial, 1.0)
    assert first.ask() is None
    more = make_sweep(trials=4)
    assert more.ask().number == 3


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_choices_follow_from_the_seed_also_after_a_restart(make_sweep: MakeSweep, sampler: str) -> None:
    def choose(folder: str, seed: int, restart: bool) -> list[float]:
        sweep, found = make_sweep(folder=folder, sampler=sampler, seed=seed, trials=4), []
        for number in range(4):
            if restart and number == 2:
                sweep = make_sweep(folder=folder, sampler=sampler, seed=seed, trials=4)
            trial = sweep.ask()
            found.append(trial.params["train.learning_rate"])
            sweep.study.tell(trial, found[-1])
        return found

    straight = choose("a", 0, False)
    assert choose("b", 0, True) == straight
    assert choose("c", 1, False) != straight
    assert len(set(straight)) == 4


def test_a_grid_goes_through_everything_once(make_sweep: MakeSweep) -> None:
    options: dict[str, Any] = {
        "parameters": {"train.seed": {"choice": [1, 2]}, "train.packing": {"choice": [True, 1]}},
        "sampler": "grid",
        "trials": 3,
    }
    sweep = make_sweep(**options)
    found = [sweep.values(sweep.ask().params) for _ in range(3)]
    assert sweep.ask() is None
    sweep = make_sweep(**{**options, "trials": 50})
    found.append(sweep.values(sweep.ask().params))
    assert sweep.ask() is None
    values = [(item["train.seed"], item["train.packing"]) for item in found]
    assert [repr(value) for value in values] == ["(1, True)", "(1, 1)", "(2, True)", "(2, 1)"]


def test_every_trial_of_a_grid_of_decimals_can_be_put_back(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(
        parameters={"train.weight_decay": {"uniform": [0.0, 0.3], "step": 0.1}}, sampler="grid", trials=4
    )
    taken = [sweep.ask() for _ in range(4)]
    for trial in taken:
        sweep.requeue(trial)
    again = [sweep.ask().params["train.weight_decay"] for _ in range(4)]
    assert again == [trial.params["train.weight_decay"] for trial in taken] == [0.0, 0.1, 0.2, 0.3]


def test_the_trial_of_a_dead_process_is_taken_up_again(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    done, lost = sweep.ask(), sweep.ask()
    sweep.study.tell(done, 0.5)
    lost.set_user_attr("owner", dead_owner())
    lost.set_user_attr("run", "r123")
    again = make_sweep().ask()
    assert again.params == lost.params
    assert again.user_attrs["run"] == "r123"  # whoever takes it goes on with its run
    sweep.study.tell(again, 0.25)
    trials = sweep.trials()
    assert [(trial.number, trial.state) for trial in trials] == [(0, "finished"), (again.number, "finished")]
    assert sweep.best().number == again.number
    assert sweep.ask() is not None  # the third of three
    assert sweep.ask() is None


def test_the_trial_of_a_living_process_is_left_to_it(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(trials=1)
    trial = sweep.ask()
    assert trial.user_attrs["owner"] == asdict(ProcessIdentity.current())
    assert make_sweep(trials=1).ask() is None
    assert [shown.state for shown in sweep.trials()] == ["running"]


def test_a_trial_that_kills_its_processes_is_given_up(make_sweep: MakeSweep) -> None:
    sweep, owner = make_sweep(trials=1), dead_owner()
    for _ in range(MAX_DEATHS):
        sweep.ask().set_user_attr("owner", owner)
    assert sweep.ask() is None
    (trial,) = sweep.trials()
    assert (trial.state, trial.error) == ("failed", "its process died 3 times")


def test_killed_between_the_copy_and_the_end_of_the_original(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(trials=1)
    sweep.ask().set_user_attr("owner", dead_owner())

    class Killed(BaseException):
        pass

    def die(*_args: Any, **_options: Any) -> None:
        raise Killed

    sweep.study.tell = die
    with pytest.raises(Killed):
        sweep.ask()
    after = make_sweep(trials=1)
    assert after.ask() is not None
    assert after.ask() is None
    assert len(after.trials()) == 1


def test_another_sweep_under_the_same_name_is_refused(make_sweep: MakeSweep) -> None:
    make_sweep()
    make_sweep(trials=9, parallel=2)
    with pytest.raises(ConfigError, match="sweep is a sweep of another recipe or of other parameters"):
        make_sweep(metric="loss")
    with pytest.raises(ConfigError, match="of another recipe"):
        make_sweep(recipe={"train": {"steps": 9}})


def test_opening_gives_the_same(make_sweep: MakeSweep) -> None:
    sweep = make_sweep(parameters={"train.steps": {"int": [2, 9], "step": 3}}, direction="maximize")
    again = Sweep.open(sweep.folder)
    assert again.section == sweep.section
    assert again.recipe == sweep.recipe
    assert {again.ask().params["train.steps"] for _ in range(3)} <= {2, 5, 8}


def test_a_broken_study_is_said(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    (sweep.folder / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match=r"the study in .* cannot be opened"):
        make_sweep()


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="sweeps need optuna") as caught:
        load_optuna()
    assert "pip install 'hearth-lm[sweep]'" in str(caught.value)
