"""Interrupted anywhere, a run goes on bit for bit as it would have."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import signal
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hearth.errors import ConfigError, IntegrityError, Interrupted, NonFiniteError, StorageError
from hearth.training import Batch, Callback, Trainer, session, updates
from hearth.training.checkpoint import CheckpointStore, store
from hearth.training.nonfinite import skip_or_raise
from hearth.training.scaler import LossScaler
from hearth.workspace import Run, Workspace

MakeTrainer = Callable[..., Trainer]
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
# Measured in seconds, or once for every process.
TIMED = {"system", "tokens_per_second", "mfu", "checkpoint_seconds", "checkpoint_stall_seconds"}


class Watch(Callback):
    """Keeps the exact figures of every step, and asks to stop after one of them."""

    def __init__(self, stop: int = -1) -> None:
        self.stop = stop
        self.steps: dict[int, tuple[float, float, float]] = {}

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, Any]) -> None:
        self.steps[step] = (metrics["loss"], metrics["grad_norm"], metrics["lr"])
        if step == self.stop:
            trainer.request_stop("test")


def recorded(run: Run) -> list[tuple[int, str, float]]:
    return [(p.step, p.name, p.value) for p in run.metrics() if p.name.split("/")[0] not in TIMED]


def last_checkpoint(run: Run) -> dict[str, bytes]:
    (newest, *_) = CheckpointStore(run.dir).list()
    return {path.name: path.read_bytes() for path in sorted(newest.iterdir())}


def disturb() -> None:
    """Whatever the process does between two runs must not matter."""
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    torch.rand(5)


def interrupt_and_resume(
    make: MakeTrainer, workspace: Workspace, stops: list[int], **sections: Any
) -> tuple[dict[int, Any], Run, Trainer]:
    """Figures of all steps, of a run that is stopped several times."""
    steps: dict[int, Any] = {}
    run_id = None
    for stop in [*stops, -1]:
        watch = Watch(stop)
        trainer = make(resume=run_id, callbacks=[watch], **sections)
        disturb()
        if stop == -1:
            run = trainer.fit()
        else:
            with pytest.raises(Interrupted):
                trainer.fit()
            run = workspace.runs.list(status="interrupted")[0]
        assert not set(steps) & set(watch.steps), "a step was taken twice"
        steps |= watch.steps
        run_id = run.id
    return steps, run, trainer


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "written in the foreground": {"checkpoint": {"every": 3, "async": False}},
    "dropout, micro-batches of one": {
        "model": {"size": None, "context_length": None, "config": {**SHAPE, "attention_dropout": 0.2}},
        "train": {"micro_batch_size": 1},
    },
    "bf16": {"train": {"precision": "bf16"}},
    "Muon": {"train": {"optimizer": "muon"}},
    "Adafactor": {"train": {"optimizer": "adafactor"}},
    "Lion": {"train": {"optimizer": "lion"}},
    "8-bit moments": {"train": {"optimizer": "adamw8bit"}},
    "averaged weights": {"train": {"ema_decay": 0.8}},
}


@pytest.mark.parametrize("case", CASES)
def test_exact(train_parts: MakeTrainer, workspace: Workspace, case: str) -> None:
    assert_exact(train_parts, workspace, CASES[case])


def test_exact_in_float16_while_the_factor_of_its_loss_moves(
    train_parts: MakeTrainer, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Doubled after every step, the factor is soon too large, is halved in a skipped step, and so on.
    monkeypatch.setattr(updates, "LossScaler", partial(LossScaler, start=2.0**20, growth_every=1))
    run = assert_exact(train_parts, workspace, {"train": {"precision": "fp16"}})
    assert 2 <= run.summary["skipped_steps"] <= 8


def assert_exact(train_parts: MakeTrainer, workspace: Workspace, sections: dict[str, Any]) -> Run:
    """Stopped three times, twice between checkpoints, a run ends as the one that nobody stopped."""
    base = {"steps": 12, "evaluate_every": 4, "learning_rate": 3e-3}
    sections = {
        "checkpoint": {"every": 3},
        **sections,
        "train": {**base, **sections.get("train", {})},
    }
    watch = Watch()
    straight = train_parts(callbacks=[watch], **sections).fit()
    steps, resumed, _ = interrupt_and_resume(train_parts, workspace, [2, 5, 9], **sections)
    assert repr(steps) == repr(watch.steps)  # the norm of a skipped step may be nan, which equals nothing
    assert sorted(steps) == list(range(1, 13))
    assert recorded(resumed) == recorded(straight)
    # Weights, moments, counters and random states: everything that a checkpoint holds.
    assert last_checkpoint(resumed) == last_checkpoint(straight)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (resumed.dir / "model" / name).read_bytes() == (straight.dir / "model" / name).read_bytes()
    return resumed


@pytest.mark.parametrize("where", ["mid-epoch", "at the boundary", "in the third epoch"])
def test_exact_over_epochs(train_parts: MakeTrainer, workspace: Workspace, where: str) -> None:
    num_rows = len(train_parts().rows)
    batch = next(size for size in (6, 4, 5, 7, 3, 2) if num_rows % size == 0)
    per_epoch = num_rows // batch
    stop = {"mid-epoch": 3, "at the boundary": per_epoch, "in the third epoch": 2 * per_epoch + 2}[where]
    steps_in_all = stop + 4
    train = {"steps": steps_in_all, "batch_size": batch, "micro_batch_size": 1, "learning_rate": 1e-3}
    watch = Watch()
    straight = train_parts(callbacks=[watch], train=train).fit()
    steps, resumed, trainer = interrupt_and_resume(train_parts, workspace, [stop], train=train)
    assert steps == watch.steps
    assert recorded(resumed) == recorded(straight)
    assert last_checkpoint(resumed) == last_checkpoint(straight)
    seen = [row for step in range(per_epoch) for row in trainer.step_rows(step)]
    assert sorted(seen) == list(range(num_rows))  # the boundary is where it is thought to be


def test_exact_with_an_adapter(train_parts: MakeTrainer, workspace: Workspace) -> None:
    base = train_parts().fit().dir / "model"
    sections: dict[str, Any] = {
        "model": {"size": None, "base": str(base), "adapter": {"rank": 4, "dropout": 0.2}},
        "train": {"steps": 10, "evaluate_every": 3, "micro_batch_size": 1},
        "checkpoint": {"every": 4},
    }
    watch = Watch()
    straight = train_parts(callbacks=[watch], **sections).fit()
    steps, resumed, _ = interrupt_and_resume(train_parts, workspace, [2, 7], **sections)
    assert steps == watch.steps
    assert recorded(resumed) == recorded(straight)
    assert last_checkpoint(resumed) == last_checkpoint(straight)


# ── what is refused, and what is said ──────────────────────────────────────────────────────────────────────


def interrupted(train_parts: MakeTrainer, workspace: Workspace, **sections: Any) -> Run:
    with pytest.raises(Interrupted):
        train_parts(callbacks=[Watch(3)], **sections).fit()
    return workspace.runs.list(status="interrupted")[0]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data": {"seed": 1}}, "the dataset|how rows are made"),
        ({"train": {"optimizer": "lion"}}, r"train\.optimizer \(adamw then, lion now\)"),
    ],
)
def test_another_recipe_is_refused(
    train_parts: MakeTrainer, workspace: Workspace, changes: dict[str, Any], what: str
) -> None:
    run = interrupted(train_parts, workspace)
    with pytest.raises(ConfigError, match=rf"cannot be resumed: .*({what})"):
        train_parts(resume=run.id, **changes).fit()
    assert workspace.runs.get(run.id).status == "interrupted"


def test_an_adapter_on_another_base_is_refused(train_parts: MakeTrainer, workspace: Workspace) -> None:
    first = train_parts().fit().dir / "model"
    second = train_parts(train={"seed": 1}).fit().dir / "model"  # same shape, other weights
    adapter = {"rank": 4}

    def model(base: Path, **adapter: Any) -> dict[str, Any]:
        return {"size": None, "base": str(base), "adapter": adapter}

    run = interrupted(train_parts, workspace, model=model(first, rank=4))
    with pytest.raises(ConfigError, match=r"cannot be resumed: model\.base"):
        train_parts(resume=run.id, model=model(second, rank=4)).fit()
    with pytest.raises(ConfigError, match=r"cannot be resumed: model\.adapter"):
        train_parts(resume=run.id, model=model(first, rank=4, alpha=3.0)).fit()
    assert train_parts(resume=run.id, model=model(first, **adapter)).fit().status == "finished"


def test_what_is_not_bitwise_is_said(
    train_parts: MakeTrainer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    run = interrupted(train_parts, workspace)
    other = {"micro_batch_size": 4, "beta2": 0.5}
    train_parts(resume=run.id, train=other).fit()
    said = capsys.readouterr().err
    assert "does not go on bit for bit as it would have: micro_batch_size (2 then, 4 now)" in said
    assert "train.beta2 (0.95 then, 0.5 now)" in said


def test_all_damaged(train_parts: MakeTrainer, workspace: Workspace) -> None:
    run = interrupted(train_parts, workspace)
    for path in CheckpointStore(run.dir).list():
        (path / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match="none of the 1 checkpoints"):
        train_parts(resume=run.id).fit()


# ── the best, the disk, Ctrl-C ─────────────────────────────────────────────────────────────────────────────


class Figures(Trainer):
    """Evaluates to numbers that were made up."""

    def evaluate(self) -> dict[str, float]:
        accuracy = {2: 0.3, 4: 0.9, 6: 0.5, 8: 0.7}.get(self.state.step, 0.0)
        return {"eval_loss": 1.0 / (1 + self.state.step), "eval_accuracy": accuracy}


def test_best_by_another_metric(train_parts: MakeTrainer) -> None:
    checkpoint = {"every": 1, "best_metric": "eval_accuracy", "best_mode": "max"}
    trainer = train_parts(train={"evaluate_every": 2}, checkpoint=checkpoint)
    trainer.__class__ = Figures
    run = trainer.fit()
    found = CheckpointStore(run.dir)
    assert found.best() == run.dir / "checkpoints" / "step-000004"
    assert found.find("best").metrics == {"eval_loss": 0.2, "eval_accuracy": 0.9}
    assert [path.name for path in found.list()] == ["step-000008", "step-000007", "step-000004"]
    assert run.summary["best_eval_accuracy"] == 0.9


@pytest.mark.parametrize("every", [2, 0])
def test_a_metric_that_nobody_measures_costs_no_step(train_parts: MakeTrainer, every: int) -> None:
    train = {"evaluate_every": every}
    trainer = train_parts(train=train, checkpoint={"best_metric": "eval_bleu"})
    with pytest.raises(ConfigError, match="best_metric 'eval_bleu' is not measured") as caught:
        trainer.fit()
    assert "checkpoint.best_metric=eval_loss" in str(caught.value)
    assert trainer.run is not None
    (saved,) = CheckpointStore(trainer.run.dir).list()
    assert saved.name == f"step-00000{every or 8}"
    resumed = train_parts(train=train, resume=trainer.run.id).fit()
    assert resumed.summary["best_eval_loss"] is not None


class Broken(Trainer):
    """Evaluates to what is no number, but for two steps."""

    def evaluate(self) -> dict[str, float]:
        return {"eval_loss": {2: math.nan, 4: 2.0, 6: -math.inf}.get(self.state.step, math.inf)}


def test_an_evaluation_that_is_not_finite_is_saved_and_never_the_best(train_parts: MakeTrainer) -> None:
    trainer = train_parts(train={"evaluate_every": 2}, checkpoint={"every": 1})
    trainer.__class__ = Broken
    run = trainer.fit()
    assert CheckpointStore(run.dir).find("best").step == 4
    assert (run.summary["best_eval_loss"], run.summary["eval_loss"]) == (2.0, None)
    state = json.loads(last_checkpoint(run)["state.json"])["parts"]["training"]
    assert (state["step"], state["last_eval_step"], state["last_eval_loss"]) == (8, 8, None)


def test_a_run_that_is_killed_after_it_stopped_early_trains_no_further(
    train_parts: MakeTrainer, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Worse(Trainer):
        def evaluate(self) -> dict[str, float]:
            return {"eval_loss": float(self.state.step)}

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    def make(**options: Any) -> Trainer:
        trainer = train_parts(
            train={"steps": 40, "evaluate_every": 2, "early_stopping_patience": 2}, **options
        )
        trainer.__class__ = Worse
        return trainer

    monkeypatch.setattr(session, "leave_result", killed)
    with pytest.raises(KeyboardInterrupt):
        make().fit()
    monkeypatch.undo()
    (run,) = workspace.runs.list()
    assert CheckpointStore(run.dir).load_newest().step == 6
    watch = Watch()
    resumed = make(resume=run.id, callbacks=[watch]).fit()
    assert watch.steps == {}
    assert (resumed.summary["steps"], resumed.summary["model_step"]) == (6, 2)


def test_a_writer_that_breaks_too_does_not_hide_what_ended_the_run(
    train_parts: MakeTrainer, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_loss = threading.Event()

    class Fails(Trainer):
        def compute_loss(self, model: Any, batch: Batch) -> Any:
            if self.state.step == 2:
                in_the_loss.set()
                raise ZeroDivisionError("in the loss")
            return super().compute_loss(model, batch)

    def breaks(*_: Any) -> Any:
        in_the_loss.wait(30)
        raise RuntimeError("in the writer")

    monkeypatch.setattr(store, "write_tensors", breaks)
    trainer = train_parts(checkpoint={"every": 2})
    trainer.__class__ = Fails
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    (run,) = workspace.runs.list()
    assert (run.status, run.error) == ("failed", "ZeroDivisionError: in the loss")


def test_the_best_by_another_metric_than_before_is_found_anew(
    train_parts: MakeTrainer, workspace: Workspace
) -> None:
    class Two(Trainer):
        def evaluate(self) -> dict[str, float]:
            return {"eval_loss": 3.0 + self.state.step, "eval_accuracy": 0.1 * self.state.step}

    def make(**options: Any) -> Trainer:
        trainer = train_parts(train={"evaluate_every": 2}, **options)
        trainer.__class__ = Two
        return trainer

    with pytest.raises(Interrupted):
        make(callbacks=[Watch(5)]).fit()
    (run,) = workspace.runs.list()
    assert CheckpointStore(run.dir).find("best").step == 2
    resumed = make(resume=run.id, checkpoint={"best_metric": "eval_accuracy", "best_mode": "max"}).fit()
    assert CheckpointStore(run.dir).find("best").step == 8
    assert resumed.summary["best_eval_accuracy"] == pytest.approx(0.8)


class SmallFiles(Callback):
    """Once the first checkpoint is there, no file may grow beyond this: the writer is stopped half-way."""

    def on_checkpoint(self, trainer: Trainer, step: int, path: Path) -> None:
        size = (path / "optimizer.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, resource.RLIM_INFINITY))


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_refuses_stops_the_run_and_keeps_the_previous_checkpoint(
    train_parts: MakeTrainer, workspace: Workspace, background: bool
) -> None:
    sections: dict[str, Any] = {"train": {"steps": 40}, "checkpoint": {"every": 2, "async": background}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(StorageError, match=r"cannot write checkpoint .*: File too large"):
            train_parts(callbacks=[SmallFiles()], **sections).fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run = workspace.runs.list()[0]
    assert run.status == "failed"
    assert "File too large" in (run.error or "")
    (left,) = (run.dir / "checkpoints").iterdir()
    assert left.name == (run.dir / "latest").read_text().strip()
    assert not (run.dir / "model").exists()
    assert train_parts(resume=run.id, **sections).fit().summary["steps"] == 40


def test_a_full_disk_at_the_very_end(
    train_parts: MakeTrainer, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = store.write_tensors

    def full(path: Path, *rest: Any) -> Any:
        if "step-000008" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, *rest)

    monkeypatch.setattr(store, "write_tensors", full)
    with pytest.raises(StorageError, match="the disk is full"):
        train_parts(checkpoint={"every": 4}).fit()
    run = workspace.runs.list()[0]
    assert (run.status, (run.dir / "latest").read_text()) == ("failed", "step-000004\n")
    monkeypatch.undo()
    assert train_parts(resume=run.id, checkpoint={"every": 4}).fit().summary["steps"] == 8


class Signals(Callback):
    """Ctrl-C after a step, several times."""

    def __init__(self, step: int, times: int) -> None:
        self.step, self.times = step, times

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, Any]) -> None:
        if step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_its_save(
    train_parts: MakeTrainer, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = store.write_tensors

    def slow(*args: Any) -> Any:
        threading.Event().wait(0.2)
        return original(*args)

    monkeypatch.setattr(store, "write_tensors", slow)
    with pytest.raises(Interrupted, match="checkpoint saved"):
        train_parts(callbacks=[Signals(3, 1)]).fit()
    run = workspace.runs.list(status="interrupted")[0]
    assert CheckpointStore(run.dir).load_newest().step == 3


def test_a_second_ctrl_c_gives_up_the_save_under_way(
    train_parts: MakeTrainer, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = store.write_tensors
    reached, go_on = threading.Event(), threading.Event()

    def held(path: Path, *rest: Any) -> Any:
        if "step-000004" in str(path):
            reached.set()
            go_on.wait(20)
        return original(path, *rest)

    class Twice(Signals):
        def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, Any]) -> None:
            if step == self.step:
                assert reached.wait(20)
                threading.Timer(0.1, go_on.set).start()
            super().on_step(trainer, step, metrics)

    monkeypatch.setattr(store, "write_tensors", held)
    with pytest.raises(KeyboardInterrupt):
        train_parts(callbacks=[Twice(5, 2)], checkpoint={"every": 2}).fit()
    run = workspace.runs.list(status="interrupted")[0]
    assert [path.name for path in (run.dir / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert train_parts(resume=run.id, checkpoint={"every": 2}).fit().summary["steps"] == 8


# ── steps that are not finite ──────────────────────────────────────────────────────────────────────────────


class Poisoned(Trainer):
    """A loss that breaks on certain rows."""

    poison: frozenset[int] = frozenset()

    def compute_loss(self, model: Any, batch: Batch) -> Any:
        loss, count = super().compute_loss(model, batch)
        return loss * (float("nan") if self.poison & set(batch.rows) else 1.0), count


def poisoned(make: MakeTrainer, bad_steps: tuple[int, ...], **options: Any) -> Trainer:
    trainer = make(**options)
    trainer.__class__ = Poisoned
    trainer.poison = frozenset(trainer.step_rows(step)[1] for step in bad_steps)  # type: ignore[attr-defined]
    return trainer


SKIP: dict[str, Any] = {
    "model": {"size": None, "context_length": None, "config": {**SHAPE, "attention_dropout": 0.2}},
    "train": {"on_non_finite": "skip", "max_skipped_steps": 2, "steps": 12, "micro_batch_size": 2},
    "checkpoint": {"every": 1},
}


def test_skipped_steps_keep_schedule_and_data(
    train_parts: MakeTrainer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    before: dict[str, torch.Tensor] = {}

    class Unchanged(Watch):
        def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, Any]) -> None:
            super().on_step(trainer, step, metrics)
            now = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
            same = [torch.equal(now[name], before[name]) for name in before]
            assert all(same) if metrics["skipped"] else not any(same[:1])
            before.update(now)

    watch = Unchanged()
    trainer = poisoned(train_parts, (3, 4, 8), callbacks=[watch], **SKIP)
    run = trainer.fit()
    rates = [rate for _, _, rate in watch.steps.values()]
    assert rates == [trainer.learning_rate(step) for step in range(12)]
    assert run.summary["skipped_steps"] == 3
    assert [(p.step, p.value) for p in run.metrics("skipped_steps")] == [(4, 1.0), (5, 2.0), (9, 3.0)]
    assert [p.step for p in run.metrics("loss")] == [1, 2, 3, 6, 7, 8, 10, 11, 12]
    said = capsys.readouterr().err
    (bad,) = trainer.poison & set(trainer.step_rows(3))  # type: ignore[attr-defined]
    assert "the update is skipped: loss nan in step 4" in said
    assert f"row {bad}: document" in said
    state = json.loads(last_checkpoint(run)["state.json"])
    assert state["parts"]["training"]["num_skipped_steps"] == 3
    assert state["parts"]["training"]["num_tokens"] < trainer.total_steps * 4 * 32


def test_looking_for_the_cause_draws_no_random_number(train_parts: MakeTrainer) -> None:
    trainer = poisoned(train_parts, (0,), **SKIP)
    trainer.model.train()  # with dropout
    batches = trainer.objective.batches(trainer, 0, trainer.step_rows(0))
    before = torch.get_rng_state()
    assert "loss nan in step 1" in skip_or_raise(trainer, 0, batches, float("nan"), 1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", [4, 5, 7])
def test_resume_after_skips_is_exact(train_parts: MakeTrainer, workspace: Workspace, stop: int) -> None:
    def make(**options: Any) -> Trainer:
        return poisoned(train_parts, (3, 4, 8), **options)

    watch = Watch()
    straight = make(callbacks=[watch], **SKIP).fit()
    steps, resumed, _ = interrupt_and_resume(make, workspace, [stop], **SKIP)
    assert {step: figures[2] for step, figures in steps.items()} == {
        step: figures[2] for step, figures in watch.steps.items()
    }
    assert recorded(resumed) == recorded(straight)
    assert last_checkpoint(resumed) == last_checkpoint(straight)


def test_too_many_skips_in_a_row_stop(train_parts: MakeTrainer, workspace: Workspace) -> None:
    trainer = poisoned(train_parts, (1, 5, 6, 7), **SKIP)
    with pytest.raises(
        NonFiniteError, match=r"max_skipped_steps: 2 steps in a row were skipped.*loss nan in step 8"
    ):
        trainer.fit()
    run = workspace.runs.list()[0]
    assert run.status == "failed"
    assert CheckpointStore(run.dir).load_newest().state["parts"]["training"]["skipped_in_a_row"] == 2
