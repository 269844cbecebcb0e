"""`hearth train RECIPE --sweep [SWEEP]`: many trials of one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.cli.output import note, print_json, print_table
from hearth.errors import ConfigError

if TYPE_CHECKING:
    from hearth.config import Recipe
    from hearth.config.sweep import SweepSection
    from hearth.training.sweep import SweepResult
    from hearth.workspace import Workspace

# The value of --sweep without a file.
OWN_SECTION = "-"


def sweep_section(recipe: Recipe, path: str) -> SweepSection:
    """The sweep of a file, or the recipe's own. Raises ConfigError."""
    from hearth.config.loading import load_settings
    from hearth.config.sweep import SweepSection

    if path != OWN_SECTION:
        return load_settings(SweepSection, path, environ={}).settings
    if recipe.sweep is None:
        raise ConfigError("the recipe has no sweep section", fix="add one, or give --sweep FILE")
    return recipe.sweep


def run(recipe: Recipe, path: str, workspace: Workspace, *, name: str, quiet: bool, as_json: bool) -> None:
    """Run a sweep and print its results."""
    from hearth.config.sweep import check_sweep

    section = sweep_section(recipe, path)
    check_sweep(section, recipe)  # before torch is loaded
    from hearth.training.sweep import run_sweep

    result = run_sweep(
        recipe, section, workspace, name=Path(name).stem, say=(lambda _text: None) if quiet else note
    )
    if as_json:
        print_json(result.as_dict())
    else:
        _print(result, section)


def _print(result: SweepResult, section: SweepSection) -> None:
    sign = 1.0 if result.direction == "minimize" else -1.0
    ranked = sorted(
        result.trials,
        key=lambda t: (t.state != "finished", t.value is None, sign * (t.value or 0.0), t.number),
    )
    print_table(
        ("trial", "state", result.metric, *section.parameters, "took", "run"),
        (
            (
                trial.number,
                trial.state,
                _number(trial.value),
                *(_number(trial.params.get(key)) for key in section.parameters),
                "" if trial.seconds is None else f"{trial.seconds:.1f} s",
                trial.run,
            )
            for trial in ranked
        ),
        title=f"Sweep {result.name}",
    )
    for trial in ranked:
        if trial.error:
            note(f"trial {trial.number} {trial.state}: {trial.error}")
    note(f"plot: {result.folder / 'plot.svg'}")
    note(f"train the best: hearth train {result.folder / 'best.yaml'}")


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)
