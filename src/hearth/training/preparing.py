"""Progress of data preparation, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class PreparationProgress:
    """The stages of ``prepare_dataset`` as a bar on a terminal; silent elsewhere."""

    def __init__(self, *, enabled: bool) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, stage: str, total: int | None = None) -> None:
        """A stage begins."""
        self._task = self._bar.add_task(stage, total=total)

    def advance(self, num_units: int = 1) -> None:
        """So much more is done."""
        if self._task is not None:
            self._bar.advance(self._task, num_units)

    def finish(self) -> None:
        """The stage is over."""
        if self._task is not None:
            task = self._bar.tasks[self._task]
            self._bar.update(self._task, total=task.total or 1, completed=task.total or 1)
