"""A step whose loss or gradient is not finite: which samples broke it, and whether training goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hearth.errors import NonFiniteError
from hearth.training import rng
from hearth.training.batches import Batch, describe_row
from hearth.training.clipping import total_norm
from hearth.training.objectives import Objective
from hearth.training.precision import autocast
from hearth.training.totals import LossTotals, as_losses

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer

_MOST_NAMED = 3


def skip_or_raise(
    trainer: Trainer, step: int, batches: Sequence[Batch], loss: float, grad_norm: float
) -> str:
    """What to say of a step whose update is skipped, where ``train.on_non_finite`` allows it.

    Raises NonFiniteError otherwise, and when ``train.max_skipped_steps`` have been skipped in a row. Weights,
    optimizer and random state stay as they are; the gradients are gone.
    """
    section = trainer.config.train
    before = rng.capture()
    error = non_finite_error(trainer, step, batches, loss, grad_norm)
    rng.restore(*before)
    if section.on_non_finite == "stop":
        raise error
    in_a_row = trainer.state.skipped_in_a_row
    if in_a_row >= section.max_skipped_steps:
        raise NonFiniteError(
            f"train.max_skipped_steps: {in_a_row} steps in a row were skipped, and the next one breaks too: "
            f"{error.message}",
            fix=error.fix,
        )
    return error.message


def non_finite_error(
    trainer: Trainer, step: int, batches: Sequence[Batch], loss: float, grad_norm: float
) -> NonFiniteError:
    """The error for a step that must not be taken, with the rows and documents that cause it."""
    units = _units(trainer, batches)
    if trainer.world.size > 1 or trainer.config.parallel.engine == "deepspeed":
        everywhere = trainer.world.gather([(unit.rows, broke) for unit, broke in _tried(trainer, units)])
        tried = [each for found in everywhere for each in found]
    else:
        tried = [(unit.rows, _breaks(trainer, unit)) for unit in units]
    broken = [rows for rows, broke in tried if broke]
    trainer.optimizer.zero_grad(set_to_none=True)
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
    if broken and len(broken) == len(tried):
        where = "every row of the step does so, which points at the weights rather than at the data"
        fix = (
            "lower train.learning_rate, add train.warmup_steps, or resume from the last checkpoint with them"
        )
    elif broken:
        where = _described(trainer, broken, "; ")
        fix = "look at these documents with `hearth data inspect`, or lower train.learning_rate"
    else:
        where = "no single row does so; the step had " + _described(trainer, [r for r, _ in tried], ", ")
        fix = "lower train.learning_rate"
    return NonFiniteError(
        f"{what} in step {step + 1}; the optimizer step was not taken, the weights are unchanged. {where}",
        fix=fix,
    )


def _units(trainer: Trainer, batches: Sequence[Batch]) -> list[Batch]:
    """What is tried alone: each row, or each micro-batch where an objective makes them for a whole step."""
    objective = trainer.objective
    if type(objective).batches is not Objective.batches:
        return list(batches)
    rows = [row for batch in batches for row in batch.rows]
    if trainer.world.size == 1:  # several processes try equally many, so one may try a row twice
        rows = list(dict.fromkeys(rows))
    return [objective.collate(trainer.rows, [row]) for row in rows]


def _tried(trainer: Trainer, units: Sequence[Batch]) -> list[tuple[Batch, bool]]:
    """Which units give a loss that is not finite, where all processes must do the same things: no backward
    pass, as a gradient is that of all of them. A pipeline tries none.
    """
    if trainer.config.parallel.pipeline > 1:
        return [(unit, False) for unit in units]
    with torch.no_grad():
        return [(unit, not math.isfinite(float(trainer.loss_of(unit)))) for unit in units]


def _breaks(trainer: Trainer, batch: Batch) -> bool:
    """Whether a batch alone gives a loss or a gradient that is not finite."""
    trainer.optimizer.zero_grad(set_to_none=True)
    counts = trainer.objective.counts(batch)
    if not any(counts.values()):
        return False
    with autocast(trainer.precision, trainer.device):
        losses = as_losses(trainer.compute_loss(trainer.model, batch.to(trainer.device)))
    loss = LossTotals(trainer.device).add(losses, counts)
    if not math.isfinite(float(loss.detach())):
        return True
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    return not math.isfinite(float(total_norm(trainer.updates.gradients())))


def _described(trainer: Trainer, groups: Sequence[Sequence[int]], separator: str) -> str:
    rows = list(dict.fromkeys(row for group in groups for row in group))[:_MOST_NAMED]
    return separator.join(describe_row(trainer.rows, row) for row in rows)
