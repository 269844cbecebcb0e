"""`hearth demo`: raw text to an answering endpoint, in minutes, offline."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import click

from hearth.cli.output import error_console, print_json


def _finite(_context: click.Context, _option: click.Parameter, minutes: float | None) -> float | None:
    if minutes is not None and math.isnan(minutes):  # compares false with every bound
        raise click.BadParameter("nan is not a number of minutes")
    return minutes


@click.command()
@click.option(
    "--minutes",
    default=None,
    type=click.FloatRange(min=0.05, max=100_000),
    callback=_finite,
    help="Minutes of training; the other stages take about two more. [default: 3.5]",
)
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def demo(minutes: float | None, as_json: bool) -> None:
    """Make a language model from the Python standard library and ask it questions, in minutes, offline.

    Builds a dataset, trains a tokenizer and a model, teaches it to answer, measures it, registers it, passes
    the parity gate, serves it and asks it questions. A second run reuses what has not changed.
    """
    from rich.console import Console

    from hearth.cli.progress import RichProgress
    from hearth.demo import DEFAULT_MINUTES, render, run_demo
    from hearth.workspace import Workspace

    console = error_console()
    with Workspace.open() as workspace:
        report = run_demo(
            workspace,
            console,
            minutes=minutes or DEFAULT_MINUTES,
            show_progress=lambda: RichProgress(console),
            command=_command_name(),
        )
    if as_json:
        print_json(report.to_dict())
    else:
        Console(width=None if sys.stdout.isatty() else 100).print("\n" + render(report), highlight=False)


def _command_name() -> str:
    """How the user calls hearth: by name where it is on the PATH, by its path after `make demo`."""
    program = Path(sys.argv[0])
    on_path = any(
        (Path(folder) / "hearth").exists() for folder in os.environ.get("PATH", "").split(os.pathsep)
    )
    if on_path or program.name != "hearth":
        return "hearth"
    return os.path.relpath(program)
