"""Progress bars on standard error for long work: ``hearth.data.Progress`` drawn by rich."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

STAGES = {
    "read": "reading and hashing sources",
    "filter": "filtering and deduplicating",
    "tokenizer": "training the tokenizer",
    "tokenize": "tokenising",
}


class RichProgress:
    """One bar a stage, with bytes, MB/s and time. Where nobody watches (no terminal), a line a stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def start(self, stage: str, total: int | None = None) -> None:
        """A stage begins; ``total`` is in bytes."""
        description = STAGES.get(stage, stage)
        if not self._console.is_terminal:
            self._console.print(f"{description} …", highlight=False)
        self._task = self._progress.add_task(description, total=total)

    def advance(self, num_units: int = 1) -> None:
        """So many bytes more are done."""
        if self._task is not None:
            self._progress.advance(self._task, num_units)

    def finish(self) -> None:
        """The stage is over."""
        if self._task is not None:
            done = self._progress.tasks[self._progress.task_ids.index(self._task)].completed
            self._progress.update(self._task, total=done or 1, completed=done or 1)
        self._task = None
