"""Callbacks: the order of events, and what happens when one raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hearth.errors import Interrupted, TrainingError
from hearth.training import Callback, Trainer
from hearth.workspace import Run, Workspace

MakeTrainer = Callable[..., Trainer]


class Events(Callback):
    """Writes down what happens; raises where it is told to."""

    def __init__(self, fail_in: str = "") -> None:
        self.events: list[str] = []
        self._fail_in = fail_in

    def _note(self, event: str) -> None:
        self.events.append(event)
        if event == self._fail_in:
            raise ValueError("my own mistake\nwith a second line")

    def on_start(self, trainer: Trainer, run: Run) -> None:
        self._note(f"start {trainer.state.step}")

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        self._note(f"step {step}")

    def on_evaluate(self, trainer: Trainer, step: int, figures: Mapping[str, float]) -> None:
        self._note(f"evaluate {step}")

    def on_checkpoint(self, trainer: Trainer, step: int, path: Path) -> None:
        self._note(f"checkpoint {step}")

    def on_end(self, trainer: Trainer, run: Run, status: str) -> None:
        self._note(f"end {status}")


SECTIONS: dict[str, Any] = {
    "train": {"steps": 4, "evaluate_every": 2},
    "checkpoint": {"every": 3, "async": False},
}


def test_the_order_of_events(train_parts: MakeTrainer) -> None:
    events = Events()
    train_parts(callbacks=[events], **SECTIONS).fit()
    assert events.events == [
        *("start 0", "step 1", "step 2", "evaluate 2", "checkpoint 2", "step 3", "checkpoint 3"),
        *("step 4", "evaluate 4", "checkpoint 4", "end finished"),
    ]


@pytest.mark.parametrize("where", ["step 2", "evaluate 2", "checkpoint 2"])
def test_one_that_raises_ends_the_run_with_a_checkpoint(
    train_parts: MakeTrainer, workspace: Workspace, where: str
) -> None:
    straight, broken, other = Events(), Events(where), Events()
    reference = train_parts(callbacks=[straight], **SECTIONS).fit()
    event = f"on_{where.split()[0]}"
    with pytest.raises(
        TrainingError, match=f"^callback Events failed in {event} at step 2: ValueError: my own mistake\n"
    ) as caught:
        train_parts(callbacks=[broken, other], **SECTIONS).fit()
    assert isinstance(caught.value.__cause__, ValueError)
    run = workspace.runs.list(status="failed")[0]
    assert run.error == f"callback Events failed in {event} at step 2: ValueError: my own mistake"
    assert (run.dir / "latest").read_text().strip() == "step-000002"
    # The step is finished for everybody else, and the one that raised hears nothing more.
    assert other.events == ["start 0", "step 1", "step 2", "evaluate 2", "checkpoint 2", "end failed"]
    assert broken.events[-1] == where
    # What it cut short goes on as if it had not been there.
    resumed = train_parts(resume=run.id, **SECTIONS).fit()
    assert [(p.step, p.value) for p in resumed.metrics("loss")] == [
        (p.step, p.value) for p in reference.metrics("loss")
    ]
    assert [p.value for p in resumed.metrics("eval_loss")] == [
        p.value for p in reference.metrics("eval_loss")
    ]


def test_one_that_raises_at_the_start_or_the_end(train_parts: MakeTrainer, workspace: Workspace) -> None:
    with pytest.raises(TrainingError, match="callback Events failed in on_start at step 0"):
        train_parts(callbacks=[Events("start 0")], **SECTIONS).fit()
    other = Events()
    with pytest.raises(TrainingError, match="callback Events failed in on_end at step 4"):
        train_parts(callbacks=[Events("end finished"), other], **SECTIONS).fit()
    assert other.events[-2:] == ["checkpoint 4", "end finished"]
    last, first = workspace.runs.list()
    assert (first.status, last.status) == ("failed", "failed")
    assert (last.dir / "latest").read_text().strip() == "step-000004"
    assert (last.dir / "model" / "model.safetensors").is_file()


def test_the_end_of_an_interrupted_run(train_parts: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(Events):
        def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
            super().on_step(trainer, step, metrics)
            if step == 1:
                trainer.request_stop("enough")

    events = Stop("end interrupted")
    with pytest.raises(Interrupted, match="stopped after step 1 of 4"):
        train_parts(callbacks=[events], **SECTIONS).fit()
    assert events.events == ["start 0", "step 1", "checkpoint 1", "end interrupted"]
    # The interruption stays what ended the run; the callback is heard all the same.
    assert "warning: callback Stop failed in on_end at step 1: ValueError" in capsys.readouterr().err


def test_interrupting_a_callback_is_no_failure_of_it(train_parts: MakeTrainer, workspace: Workspace) -> None:
    class Wait(Callback):
        def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_parts(callbacks=[Wait()], **SECTIONS).fit()
    assert workspace.runs.list()[0].status == "interrupted"
