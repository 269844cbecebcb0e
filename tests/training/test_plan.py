"""The estimate of memory beside what a step really takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hearth.config.recipe import TrainSection
from hearth.models.building import model_from_config
from hearth.models.sizes import config_for_size
from hearth.training.activation import checkpoint_activations
from hearth.training.batches import Batch
from hearth.training.loss import token_loss_sum
from hearth.training.optimizers import build_optimizer, state_bytes
from hearth.training.peak_memory import peak_bytes
from hearth.training.plan import _WORKSPACE, estimate_memory
from hearth.training.precision import autocast

CPU = torch.device("cpu")


def measured(model: Any, precision: str, num_rows: int, length: int) -> int:
    """Peak of the second micro-batch of a step, with weights and gradients."""
    ids = torch.randint(0, 320, (num_rows, length))
    labels, positions = ids.roll(-1, 1), torch.arange(length)[None].repeat(num_rows, 1)
    batch = Batch(
        ids, labels, positions, torch.zeros_like(ids), num_valid=ids.numel(), num_tokens=ids.numel()
    )

    def work() -> None:
        with autocast(precision, CPU):
            loss, _ = token_loss_sum(model, batch)
        loss.backward()

    work()
    return peak_bytes(work, CPU) + 2 * sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_within_a_third_of_what_a_step_takes(precision: str, checkpointing: str) -> None:
    model = model_from_config(config_for_size("1M", "qwen3", 320, 256), seed=0).train()
    checkpoint_activations(model, checkpointing)
    estimate = estimate_memory(
        model,
        micro_batch_size=2,
        sequence_length=256,
        precision=precision,
        optimizer_bytes=0,
        checkpointing=checkpointing,
    )
    assert estimate - _WORKSPACE == pytest.approx(measured(model, precision, 2, 256), rel=0.33)


def test_optimizer_and_average_count() -> None:
    model = model_from_config(config_for_size("100K", "qwen3", 320, 64), seed=0)
    trainable = sum(weight.numel() for weight in model.parameters())
    keys = {"micro_batch_size": 1, "sequence_length": 8, "precision": "fp32"}
    adamw = state_bytes(build_optimizer(model, TrainSection()))
    base = estimate_memory(model, **keys, optimizer_bytes=0)
    assert estimate_memory(model, **keys, optimizer_bytes=adamw) - base == adamw
    assert adamw == pytest.approx(8 * trainable, rel=0.01)
    assert estimate_memory(model, **keys, optimizer_bytes=0, averaged=True) - base == 4 * trainable
