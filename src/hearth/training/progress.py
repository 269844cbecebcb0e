"""What a person sees while a model trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_SECONDS_BETWEEN_LINES = 15.0
_TELLING = ("reward", "accuracy")


def format_seconds(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = round(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class TrainingProgress:
    """Writes to standard error. Time left follows from the steps of this process alone."""

    def __init__(self, *, first_step: int, total_steps: int, enabled: bool) -> None:
        self._console = Console(stderr=True)
        self._first, self._total = first_step, total_steps
        self._enabled = enabled
        self._bar: Progress | None = None
        self._started = time.monotonic()
        self._last_line = -_SECONDS_BETWEEN_LINES
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=False,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, figures="")

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, figures: Mapping[str, float | None]) -> None:
        """``step`` steps are done; figures: loss, lr, tokens_per_second, mfu, eval_loss, reward, accuracy."""
        if not self._enabled:
            return
        done = step - self._first
        left = (time.monotonic() - self._started) / max(1, done) * (self._total - step)
        parts = [f"loss {figures['loss']:.4f}"]
        # The loss of a policy hovers around zero, and that of a comparison says little by itself.
        parts += [f"{name} {figures[name]:.3f}" for name in _TELLING if figures.get(name) is not None]
        parts.append(f"lr {figures['lr']:.2e}")
        parts.append(f"{figures['tokens_per_second']:,.0f} tok/s")
        if figures.get("mfu") is not None:
            parts.append(f"MFU {figures['mfu']:.1%}")
        if figures.get("eval_loss") is not None:
            parts.append(f"eval {figures['eval_loss']:.4f}")
        text = "  ".join([*parts, f"left {format_seconds(left)}"])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._total:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._total}  {text}")

    def say(self, message: str) -> None:
        """A line that stays, above the bar."""
        if self._enabled:
            (self._bar.console if self._bar else self._console).print(
                message, markup=False, highlight=False, soft_wrap=True
            )

    def warn(self, message: str) -> None:
        """A line that is shown even without progress."""
        self._console.print(
            f"warning: {message}", markup=False, highlight=False, style="yellow", soft_wrap=True
        )
