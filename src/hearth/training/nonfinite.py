"""Which documents broke a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from hearth.errors import NonFiniteError
from hearth.training.batches import describe_row
from hearth.training.optimizers import trainable_parameters
from hearth.training.precision import autocast
from hearth.training.totals import LossTotals, as_losses

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer


def _row_breaks(trainer: Trainer, row: int) -> bool:
    """Whether one row alone gives a loss or a gradient that is not finite."""
    trainer.optimizer.zero_grad(set_to_none=True)
    batch = trainer.objective.collate(trainer.rows, [row]).to(trainer.device)
    counts = trainer.objective.counts(batch)
    if not any(counts.values()):
        return False
    with autocast(trainer.precision, trainer.device):
        losses = as_losses(trainer.compute_loss(trainer.model, batch))
    loss = LossTotals(trainer.device).add(losses, counts)
    if not math.isfinite(float(loss.detach())):
        return True
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = [w.grad for w in trainable_parameters(trainer.model).values() if w.grad is not None]
    return not math.isfinite(float(torch.nn.utils.get_total_norm(gradients)))


def non_finite_error(trainer: Trainer, step: int, loss: float, grad_norm: float) -> NonFiniteError:
    """The error for a step that must not be taken, with the rows and documents that cause it."""
    rows = trainer.step_rows(step)
    broken = [row for row in dict.fromkeys(rows) if _row_breaks(trainer, row)]
    trainer.optimizer.zero_grad(set_to_none=True)
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {grad_norm}"
    if broken and len(broken) == len(set(rows)):
        where = "every row of the step does so, which points at the weights rather than at the data"
        fix = (
            "lower train.learning_rate, add train.warmup_steps, or resume from the last checkpoint with them"
        )
    elif broken:
        where = "; ".join(describe_row(trainer.rows, row) for row in broken[:3])
        fix = "look at these documents with `hearth data inspect`, or lower train.learning_rate"
    else:
        where = "no single row does so; the step had " + ", ".join(
            describe_row(trainer.rows, row) for row in list(dict.fromkeys(rows))[:3]
        )
        fix = "lower train.learning_rate"
    return NonFiniteError(
        f"{what} in step {step + 1}; the optimizer step was not taken, the weights are unchanged. {where}",
        fix=fix,
    )
