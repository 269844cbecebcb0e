"""What a user may hook into a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer


class Callback:
    """Override what you need. ``trainer.request_stop()`` ends the run after the step, with a checkpoint."""

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        """After an optimizer step, counted from 1. metrics: loss, grad_norm, lr, num_tokens, seconds."""

    def on_evaluate(self, trainer: Trainer, step: int, figures: Mapping[str, float]) -> None:
        """After an evaluation. figures: eval_loss, and what else the objective measures."""

    def on_checkpoint(self, trainer: Trainer, step: int, path: Path) -> None:
        """After a checkpoint has been committed."""
