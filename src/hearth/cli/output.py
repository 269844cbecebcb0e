"""What the verbs print: JSON for scripts, tables for people, progress for whoever waits.

Data goes to standard output; progress, notes and errors go to standard error.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


def print_json(value: Any) -> None:
    """Write ``value`` as the only thing on standard output."""
    click.echo(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """Write a table to standard output; it is as wide as the terminal, or 160 columns in a pipe."""
    console = Console(width=None if Console().is_terminal else 160)
    table = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        # Text, not str: what a user wrote in brackets is no markup.
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console.print(table)


def note(message: str) -> None:
    """Write a note for a person to standard error."""
    click.echo(message, err=True)


def error_console() -> Console:
    """The console on standard error, for progress bars."""
    return Console(stderr=True)


@contextlib.contextmanager
def progress_bar(title: str, *, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress line on standard error; yields a function that is called with the number done since.

    Where standard error is not a terminal, nothing is drawn: logs stay clean.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} {task.fields[unit]}"),
        TimeElapsedColumn(),
    )
    console = error_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, unit=unit)
        yield lambda count: progress.advance(task, count)
