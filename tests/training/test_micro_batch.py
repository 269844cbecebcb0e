"""Finding the largest micro-batch: the arithmetic, by trying, and that nothing depends on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hearth.errors import ConfigError, Interrupted
from hearth.training.callbacks import Callback
from hearth.training.micro_batch import find_size, largest_size

Make = Callable[..., Any]


def test_divisors_within_four_fifths_of_the_free_memory() -> None:
    found = [
        largest_size(12, row_bytes=10, fixed_bytes=20, free_bytes=free)
        for free in (37, 38, 75, 100, 175, 999)
    ]
    assert found == [0, 1, 4, 6, 12, 12]


def test_auto_is_found_once_and_continues_as_it_was(
    train_parts: Make, free_memory: Callable[[int], None], workspace: Any
) -> None:
    auto = {"micro_batch_size": "auto", "batch_size": 8}
    free_memory(1 << 34)
    straight = train_parts(train=auto)
    run = straight.fit()
    assert straight.micro_batch_size == run.summary["micro_batch_size"] == 8

    class Stop(Callback):
        def on_step(self, trainer: Any, step: int, metrics: Any) -> None:
            if step == 3:
                trainer.request_stop("test")

    with pytest.raises(Interrupted):
        train_parts(train=auto, callbacks=[Stop()]).fit()
    free_memory(1000)  # nothing would fit now: it is not tried again
    resumed = train_parts(train=auto, resume=workspace.runs.list(status="interrupted")[0].id)
    resumed.fit()
    assert resumed.micro_batch_size == 8
    for weight, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_the_loss_does_not_depend_on_it(train_parts: Make, free_memory: Callable[[int], None]) -> None:
    free_memory(1 << 34)
    by_hand = train_parts(train={"micro_batch_size": 2, "batch_size": 8})
    found = train_parts(train={"micro_batch_size": "auto", "batch_size": 8})
    one, other = by_hand.train_step(0), found.train_step(0)
    assert found.micro_batch_size == 8
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)


@given(
    row=st.integers(1, 1000),
    fixed=st.integers(0, 10_000),
    batch=st.integers(1, 64),
    free=st.integers(1, 10**6),
    reserved=st.integers(0, 10_000),
)
def test_what_is_found_fits_and_the_next_larger_does_not(
    row: int, fixed: int, batch: int, free: int, reserved: int
) -> None:
    def needed(size: int) -> int:
        return fixed + size * row

    try:
        found = find_size(needed, batch_size=batch, reserved_bytes=reserved, free_bytes=free)
    except ConfigError:
        assert needed(1) + reserved > 0.8 * free
        return
    assert needed(found.size) + reserved <= 0.8 * free
    larger = [size for size in range(found.size + 1, batch + 1) if batch % size == 0]
    assert not larger or needed(larger[0]) + reserved > 0.8 * free


def test_out_of_memory_at_two_rows_means_one() -> None:
    def measure(size: int) -> int | None:
        return 10 if size == 1 else None

    assert find_size(measure, batch_size=8, reserved_bytes=0, free_bytes=10**9).size == 1


def test_out_of_memory_at_one_row_is_an_error() -> None:
    with pytest.raises(ConfigError, match="one row needs more") as caught:
        find_size(lambda _size: None, batch_size=8, reserved_bytes=0, free_bytes=2**30)
    assert "activation_checkpointing: full" in str(caught.value)


@pytest.fixture
def free_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_free(num_bytes: int) -> None:
        monkeypatch.setattr("hearth.training.micro_batch.available_memory", lambda _device: num_bytes)

    return set_free


def test_a_trainer_finds_what_fits(train_parts: Make, free_memory: Callable[[int], None]) -> None:
    from hearth.training.micro_batch import choose_micro_batch

    auto = {"micro_batch_size": "auto", "batch_size": 8}
    free_memory(1 << 34)
    trainer = train_parts(train=auto)
    generator = torch.get_rng_state()
    found = choose_micro_batch(trainer)
    assert found.size == 8
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(weight.grad is None for weight in trainer.model.parameters())
    assert found == choose_micro_batch(trainer)  # memory of tensors, not of the process: no noise
    free_memory(int((found.fixed_bytes + 3 * found.row_bytes) / 0.8))
    assert choose_micro_batch(trainer).size == 2
    free_memory(1000)
    with pytest.raises(ConfigError, match="one row needs"):
        choose_micro_batch(trainer)


def test_the_prediction_is_what_a_larger_micro_batch_takes(train_parts: Make) -> None:
    from hearth.training.micro_batch import choose_micro_batch
    from hearth.training.optimizers import state_bytes
    from hearth.training.peak_memory import peak_bytes
    from hearth.training.totals import add_up

    trainer = train_parts(
        train={"micro_batch_size": "auto", "batch_size": 8},
        data={"sequence_length": 64},  # below 64 tokens the buffer of the logits does not grow
    )
    found = choose_micro_batch(trainer)
    trainer.state.micro_batch_size = 8
    batches = trainer.objective.batches(trainer, 0, trainer.step_rows(0))
    assert len(batches) == 1
    expected = add_up(trainer.objective.counts(batch) for batch in batches)
    trainer._accumulate(batches, expected)  # as after the first micro-batch of a step
    gradients = sum(gradient.nbytes for gradient in trainer.updates.gradients())
    peak = peak_bytes(lambda: trainer._accumulate(batches, expected), trainer.device)
    predicted = found.fixed_bytes - state_bytes(trainer.optimizer) - gradients + 8 * found.row_bytes
    assert predicted == pytest.approx(peak, rel=0.05)
