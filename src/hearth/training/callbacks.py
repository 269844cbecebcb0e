"""What a user may hook into a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hearth.errors import TrainingError

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer
    from hearth.workspace import Run


class Callback:
    """Override what you need. ``trainer.request_stop()`` ends the run after the step, with a checkpoint.

    An exception ends the run after the step too, with a checkpoint, and the error names the callback.
    """

    def on_start(self, trainer: Trainer, run: Run) -> None:
        """Before the first step of this process; ``trainer.state.step`` is more than 0 after a resume."""

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        """After an optimizer step, counted from 1.

        metrics: loss, grad_norm, lr, num_tokens, seconds; ``metrics``, what the objective measured, by name;
        ``skipped``, why the update was not made, else "".
        """

    def on_evaluate(self, trainer: Trainer, step: int, figures: Mapping[str, float]) -> None:
        """After an evaluation. figures: eval_loss, and what else the objective measures."""

    def on_checkpoint(self, trainer: Trainer, step: int, path: Path) -> None:
        """After a checkpoint has been committed."""

    def on_end(self, trainer: Trainer, run: Run, status: str) -> None:
        """When the run ends: finished, failed or interrupted. Its record is written afterwards."""


class CallbackError(TrainingError):
    """A callback raised; the message names it, the cause is the exception."""


class CallbackRunner:
    """Calls the callbacks of a run. One that raises is not called again, and its error is kept for the loop.

    The step is finished first, with its evaluation and checkpoint, so that a resumed run continues exactly.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)
        self.error: CallbackError | None = None

    def start(self, trainer: Trainer, run: Run) -> None:
        """Raises CallbackError at once: nothing has been done yet."""
        self._call("on_start", trainer, lambda callback: callback.on_start(trainer, run))
        self.raise_error()

    def step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        """After an optimizer step."""
        self._call("on_step", trainer, lambda callback: callback.on_step(trainer, step, metrics))

    def evaluate(self, trainer: Trainer, step: int, figures: Mapping[str, float]) -> None:
        """After an evaluation."""
        self._call("on_evaluate", trainer, lambda callback: callback.on_evaluate(trainer, step, figures))

    def checkpoint(self, trainer: Trainer, step: int, path: Path) -> None:
        """After a checkpoint."""
        self._call("on_checkpoint", trainer, lambda callback: callback.on_checkpoint(trainer, step, path))

    def end(self, trainer: Trainer, run: Run, status: str) -> None:
        """At the end, however it came. The error of an earlier event stays the one that counts."""
        self._call("on_end", trainer, lambda callback: callback.on_end(trainer, run, status))

    def raise_error(self) -> None:
        """Raise what a callback has raised, if one has."""
        if self.error is not None:
            raise self.error

    def _call(self, event: str, trainer: Trainer, action: Callable[[Callback], None]) -> None:
        for callback in list(self._callbacks):
            try:
                action(callback)
            except Exception as error:  # noqa: BLE001 - a callback may raise whatever it likes
                self._callbacks.remove(callback)
                if self.error is None:
                    self.error = _described(callback, event, trainer.state.step, error)


def _described(callback: Callback, event: str, step: int, error: Exception) -> CallbackError:
    text = str(error).splitlines()
    made = CallbackError(
        f"callback {type(callback).__name__} failed in {event} at step {step}: {type(error).__name__}"
        + (f": {text[0]}" if text else ""),
        fix="correct the callback, or leave it out, and resume the run",
    )
    made.__cause__ = error
    return made
