"""The three ways to a reference give the same loss, and a table on disk is verified and used again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hearth.config.recipe import AdapterSection
from hearth.errors import ConfigError, Interrupted, TrainingError
from hearth.training import Trainer, rng
from hearth.training.adapter import add_adapter
from hearth.training.callbacks import Callback
from hearth.training.checkpoint import CheckpointStore
from hearth.training.logprobs import sequence_logprobs
from hearth.training.reference import PrecomputedReference
from hearth.training.reference_file import read_tables, write_tables
from hearth.training.samples import Sample
from hearth.workspace import Workspace

MakeTrainer = Callable[..., Trainer]
MakeSamples = Callable[..., list[Sample]]
LORA = {"rank": 4, "alpha": 16, "dropout": 0.3}


class Losses(Callback):
    """Keeps the losses; asks to stop after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.losses: list[float] = []
        self._stop_after = stop_after

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, Any]) -> None:
        self.losses.append(metrics["loss"])
        if step == self._stop_after:
            trainer.request_stop("test")


def with_adapter(golden: ModuleType) -> Any:
    return add_adapter(golden.make_model(0).float(), AdapterSection(**LORA), seed=3)


def fit(
    make: MakeTrainer,
    objective: str,
    rows: list[Sample],
    mode: str,
    workspace: Workspace,
    *,
    stop_after: int | None = None,
    **rest: Any,
) -> tuple[list[float], Trainer]:
    record = Losses(stop_after)
    train = {
        "steps": 6,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        **rest.pop("train", {}),
    }
    trainer = make(
        objective,
        rows,
        train=train,
        preference={"reference": mode},
        workspace=workspace,
        callbacks=[record],
        **rest,
    )
    try:
        trainer.fit()
    except Interrupted:
        assert stop_after is not None
    return record.losses, trainer


@pytest.mark.parametrize("objective", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precomputed_is_bitwise_what_a_frozen_model_gives(
    objective: str,
    precision: str,
    trainer_of: MakeTrainer,
    samples: MakeSamples,
    golden: ModuleType,
    workspace: Workspace,
) -> None:
    rows = samples(16, num_parts=1 if objective == "kto" else 2)
    model, held_out = golden.make_model(0).float(), samples(6, num_parts=len(rows[0].parts), seed=9)
    found = [
        fit(
            trainer_of, objective, rows, mode, workspace, model=model, eval_dataset=held_out,
            train={"precision": precision},
        )
        for mode in ("model", "precompute")
    ]  # fmt: skip
    (frozen, first), (table, second) = found
    # Four steps are the first epoch; in the second a row may share its micro-batch with other rows.
    assert frozen[:4] == table[:4]
    np.testing.assert_allclose(frozen, table, rtol=1e-6 if precision == "fp32" else 3e-2)
    assert frozen[0] != frozen[-1]
    close = {"rel": 1e-6 if precision == "fp32" else 3e-2, "abs": 1e-6 if precision == "fp32" else 3e-2}
    assert first.evaluate() == pytest.approx(second.evaluate(), **close)


def test_an_adapter_taken_off_is_the_model_it_was_put_on(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType, workspace: Workspace, tmp_path: Path
) -> None:
    rows = samples(16)
    golden.make_model(0).float().save_pretrained(tmp_path / "base")
    sections = {"model": {"base": str(tmp_path / "base"), "adapter": LORA}}
    runs = [
        fit(trainer_of, "dpo", rows, mode, workspace, model=with_adapter(golden), sections=dict(sections))
        for mode in ("adapter", "model", "auto")
    ]
    assert runs[0][0] == runs[1][0] == runs[2][0]
    assert runs[0][0][-1] != runs[0][0][0]
    table, _ = fit(
        trainer_of, "dpo", rows, "precompute", workspace, model=with_adapter(golden), sections=sections
    )
    assert table[:4] == runs[0][0][:4]


def test_the_reference_has_no_dropout_and_takes_no_random_numbers(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType
) -> None:
    rows = samples(4)
    sections = {"model": {"base": "elsewhere", "adapter": LORA}}
    model = with_adapter(golden)
    for mode in ("adapter", "model"):
        trainer = trainer_of(
            "dpo", rows, model=model, sections=dict(sections), preference={"reference": mode}
        )
        trainer.start_objective()
        (batch,) = trainer.objective.batches(trainer, 0, range(4))
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight.data, std=0.1)
        trainer.model.train()
        before = rng.capture()
        reference: Any = trainer.objective
        first = reference.reference_sums(trainer.model, batch)
        assert str(rng.capture()) == str(before)
        assert trainer.model.training
        assert torch.equal(first, reference.reference_sums(trainer.model, batch))
        with torch.no_grad():
            assert torch.equal(first, sequence_logprobs(golden.make_model(0).float(), batch)[0])
            assert not torch.equal(first, sequence_logprobs(trainer.model, batch)[0]), "dropout is on here"


def test_what_is_frozen_of_an_adapter_stays_frozen(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType
) -> None:
    """PEFT lets the whole adapter train again after it was off: the average had no such weights."""
    sections = {"model": {"base": "elsewhere", "adapter": LORA}}
    train = {"parameter_groups": [{"match": "*.lora_A.*", "freeze": True}], "ema_decay": 0.9}
    trainer = trainer_of("dpo", samples(4), model=with_adapter(golden), sections=sections, train=train)
    before = set(trainer._saved_weights())
    for step in range(2):
        trainer.train_step(step)
    assert {name for name, weight in trainer.model.named_parameters() if weight.requires_grad} == before
    assert before
    assert all(".lora_B." in name for name in before)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_resumed_run_reads_its_table_and_gives_the_same_losses(
    objective: str,
    trainer_of: MakeTrainer,
    samples: MakeSamples,
    golden: ModuleType,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = samples(16, num_parts=1 if objective == "kto" else 2)
    model = golden.make_model(0).float()
    whole, straight = fit(trainer_of, objective, rows, "precompute", workspace, model=model)
    start, stopped = fit(trainer_of, objective, rows, "precompute", workspace, model=model, stop_after=3)
    path = stopped.run.dir / "reference.safetensors"
    written = path.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("hearth.training.reference.sequence_logprobs", forbidden)
        rest, resumed = fit(
            trainer_of, objective, rows, "precompute", workspace, model=model, resume=stopped.run.id
        )
    assert start + rest == whole
    assert last_checkpoint(resumed) == last_checkpoint(straight)
    assert path.stat().st_mtime_ns == written


def last_checkpoint(trainer: Trainer) -> dict[str, bytes]:
    """Weights, moments, counters and random states."""
    assert trainer.run is not None
    (newest, *_) = CheckpointStore(trainer.run.dir).list()
    return {path.name: path.read_bytes() for path in sorted(newest.iterdir())}


def forbidden(*_: Any) -> Any:
    raise AssertionError("computed again")


def stopped_run(trainer_of: MakeTrainer, rows: Any, model: Any, workspace: Workspace, **rest: Any) -> Any:
    _, trainer = fit(trainer_of, "dpo", rows, "precompute", workspace, model=model, stop_after=3, **rest)
    return trainer.run


def test_one_flipped_bit_is_seen_and_repaired(
    trainer_of: MakeTrainer,
    samples: MakeSamples,
    golden: ModuleType,
    workspace: Workspace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, model = samples(16), golden.make_model(0).float()
    whole, _ = fit(trainer_of, "dpo", rows, "precompute", workspace, model=model)
    run = stopped_run(trainer_of, rows, model, workspace)
    path = run.dir / "reference.safetensors"
    raw = path.read_bytes()
    sound = read_tables(path)
    assert sound is not None
    for position in (3, 40, len(raw) // 2, len(raw) - 1):
        damaged = bytearray(raw)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert read_tables(path) is None, f"a flipped bit at byte {position} went unseen"
    path.write_bytes(raw[:-7])
    rest, _ = fit(trainer_of, "dpo", rows, "precompute", workspace, model=model, resume=run.id)
    assert "is damaged" in capsys.readouterr().err
    assert rest == whole[3:]
    again = read_tables(path)
    assert again is not None
    assert again.key == sound.key
    for name, table in sound.tables.items():
        np.testing.assert_array_equal(table, again.tables[name])


def test_a_table_of_other_weights_is_refused(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType, workspace: Workspace
) -> None:
    rows = samples(16)
    run = stopped_run(trainer_of, rows, golden.make_model(0).float(), workspace)
    with pytest.raises(ConfigError, match="the weights that training starts from differs") as caught:
        fit(
            trainer_of, "dpo", rows, "precompute", workspace,
            model=golden.make_model(1).float(), resume=run.id,
        )  # fmt: skip
    assert "reference.safetensors" in caught.value.message
    assert caught.value.fix
    changed = [*rows[:-1], samples(1, seed=77)[0]]
    with pytest.raises(ConfigError, match="the dataset differs"):
        fit(
            trainer_of, "dpo", changed, "precompute", workspace,
            model=golden.make_model(0).float(), resume=run.id,
        )  # fmt: skip


def test_a_frozen_copy_of_other_weights_is_refused(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType, workspace: Workspace
) -> None:
    rows, first, other = samples(8), golden.make_model(0).float(), golden.make_model(1).float()
    _, stopped = fit(trainer_of, "dpo", rows, "model", workspace, model=first, stop_after=3)
    resume = stopped.run.id
    with pytest.raises(ConfigError, match="the reference is not the model that the run began with"):
        fit(trainer_of, "dpo", rows, "model", workspace, model=other, resume=resume)
    losses, _ = fit(trainer_of, "dpo", rows, "model", workspace, model=first, resume=resume)
    whole, _ = fit(trainer_of, "dpo", rows, "model", workspace, model=first)
    assert losses == whole[3:]


def test_only_the_rows_that_the_run_meets_are_computed_and_more_when_it_goes_on_longer(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType, workspace: Workspace
) -> None:
    rows, model = samples(40), golden.make_model(0).float()
    train = {"steps": 4}
    run = stopped_run(trainer_of, rows, model, workspace, train=train)
    path = run.dir / "reference.safetensors"
    stored = read_tables(path)
    assert stored is not None
    assert int((~np.isnan(stored.tables["train"]).any(1)).sum()) == 16
    fit(trainer_of, "dpo", rows, "precompute", workspace, model=model, resume=run.id, train={"steps": 7})
    longer = read_tables(path)
    assert longer is not None
    assert int((~np.isnan(longer.tables["train"]).any(1)).sum()) == 28


def test_measuring_a_step_computes_little_and_leaves_the_start_to_the_run(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType
) -> None:
    rows = samples(40)
    trainer = trainer_of("dpo", rows, train={"steps": 10, "batch_size": 4, "micro_batch_size": 4})
    assert trainer.measure_step_seconds(1) > 0
    objective: Any = trainer.objective
    assert isinstance(objective._reference, PrecomputedReference)
    filled = objective._reference._values["train"]
    assert int((~np.isnan(filled)).all(1).sum()) == 8
    trainer.train_step(0)
    trainer.train_step(9)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_measuring_more_steps_than_a_run_that_has_started_has(
    objective: str, trainer_of: MakeTrainer, samples: MakeSamples
) -> None:
    rows = samples(12, num_parts=1 if objective == "kto" else 2)
    trainer = trainer_of(objective, rows, train={"steps": 1, "batch_size": 4, "micro_batch_size": 4})
    trainer.start_objective()
    assert trainer.measure_step_seconds(2) > 0


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_an_automatic_micro_batch_has_its_reference_first(
    objective: str, trainer_of: MakeTrainer, samples: MakeSamples
) -> None:
    rows = samples(12, num_parts=1 if objective == "kto" else 2)
    train = {"batch_size": 6, "micro_batch_size": "auto"}
    trainer = trainer_of(objective, rows, train=train, eval_dataset=rows[:5])
    assert trainer.micro_batch_size in (1, 2, 3, 6)
    by_hand = trainer_of(objective, rows, train={**train, "micro_batch_size": 2}, eval_dataset=rows[:5])
    assert trainer.train_step(0).loss == pytest.approx(by_hand.train_step(0).loss, rel=1e-9)
    assert trainer.evaluate() == pytest.approx(by_hand.evaluate(), rel=1e-6, abs=1e-9)


def test_rows_outside_the_run_have_no_precomputed_reference(
    trainer_of: MakeTrainer, samples: MakeSamples
) -> None:
    rows = samples(40)
    trainer = trainer_of("dpo", rows, train={"steps": 1, "batch_size": 2, "micro_batch_size": 2})
    trainer.start_objective()
    outside = next(index for index in range(40) if index not in trainer.step_rows(0))
    with pytest.raises(TrainingError, match="have no precomputed reference"):
        trainer.objective.collate(trainer.rows, [outside])


def test_a_reference_that_is_not_finite_names_its_sample(
    trainer_of: MakeTrainer, samples: MakeSamples, golden: ModuleType
) -> None:
    model = golden.make_model(0)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    trainer = trainer_of("dpo", samples(4), model=model)
    with pytest.raises(TrainingError, match=r"reference log-probabilities of row \d are not finite"):
        trainer.start_objective()


def test_a_full_disk_is_said_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    from hearth.errors import StorageError

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_tables(tmp_path / "reference.safetensors", {"a": "b"}, {"train": np.zeros((2, 2))})
    assert list(tmp_path.iterdir()) == []
