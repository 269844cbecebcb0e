"""`hearth runs`: list, show, compare and export runs."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hearth.cli.output import note, print_json, print_table
from hearth.cli.sparkline import sparkline
from hearth.cli.workspaces import open_existing, require_existing
from hearth.errors import NotFoundError

if TYPE_CHECKING:
    from hearth.workspace import MetricPoint, Run

_STATUSES = ("running", "finished", "failed", "interrupted")


@click.group()
def runs() -> None:
    """List, show, compare and export runs."""


@runs.command(name="list")
@click.option("--kind", help="Only runs of this kind, such as train.")
@click.option("--status", type=click.Choice(_STATUSES), help="Only runs in this state.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Newest runs to list."
)
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def list_runs(kind: str | None, status: str | None, limit: int, as_json: bool) -> None:
    """List runs, newest first."""
    with open_existing() as workspace:
        found = [] if workspace is None else workspace.runs.list(kind=kind, status=status, limit=limit)
    if as_json:
        print_json([{k: v for k, v in run.to_dict().items() if k != "recipe"} for run in found])
        return
    if workspace is not None and not found:
        note("no runs match" if kind or status else "no runs yet; `hearth train RECIPE` makes one")
    if found:
        print_table(
            ("id", "kind", "name", "status", "started", "took", "summary"),
            (
                (
                    run.id,
                    run.kind,
                    run.name,
                    run.status,
                    f"{run.created_at:%F %T}",
                    _took(run),
                    _brief(run.summary),
                )
                for run in found
            ),
        )


@runs.command()
@click.argument("run_id", metavar="ID")
@click.option("--metric", help="Print only this series.")
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def show(run_id: str, metric: str | None, as_json: bool) -> None:
    """Show the run ID: its state, summary and metrics. The beginning of an id is enough."""
    with require_existing(f"run {run_id!r}") as workspace:
        run = workspace.runs.get(run_id)
        points = run.metrics(metric)
    if metric is not None and not points:
        raise NotFoundError(
            f"run {run.id} has no metric {metric!r}", fix=f"`hearth runs show {run.id}` lists them"
        )
    if metric is not None:
        _show_series(points, as_json)
        return
    if as_json:
        print_json({**run.to_dict(), "metrics": _series_summaries(points)})
        return
    for label, value in _facts(run):
        click.echo(f"{label:<12}{value}")
    if run.summary:
        click.echo()
        print_table(("summary", "value"), ((key, _number(value)) for key, value in run.summary.items()))
    if points:
        click.echo()
        _print_metrics(points)
    if run.status == "interrupted" and (run.dir / "latest").exists():
        note(f"it has a checkpoint: `hearth train --resume {run.id}` goes on")


@runs.command()
@click.argument("run_ids", metavar="ID ID...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def compare(run_ids: tuple[str, ...], as_json: bool) -> None:
    """Compare runs: where their recipes differ, and their summaries and last metrics side by side."""
    if len(run_ids) < 2:
        raise click.UsageError("give at least two runs")
    with require_existing("runs to compare") as workspace:
        chosen = [workspace.runs.get(run_id) for run_id in run_ids]
        last = [{s["name"]: s["last"] for s in _series_summaries(run.metrics())} for run in chosen]
    columns: list[dict[str, Any]] = [
        {
            "status": run.status,
            **_flat("recipe", run.recipe or {}),
            **_flat("summary", run.summary),
            **_flat("metrics", metrics),
        }
        for run, metrics in zip(chosen, last, strict=True)
    ]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [(key, [column.get(key) for column in columns]) for key in keys]
    # Equal parts of the recipes are what one does not look for.
    rows = [row for row in rows if not row[0].startswith("recipe.") or any(v != row[1][0] for v in row[1])]
    ids = [run.id for run in chosen]
    if as_json:
        print_json({"runs": ids, "rows": {key: dict(zip(ids, values, strict=True)) for key, values in rows}})
    else:
        print_table(("", *ids), ((key, *map(_number, values)) for key, values in rows))


@runs.command()
@click.argument("run_id", metavar="ID")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--step", default="latest", show_default=True, metavar="N|best|latest", help="Which checkpoint to export."
)
@click.option("--json", "as_json", is_flag=True, help="Print only JSON.")
def export(run_id: str, out: Path, step: str, as_json: bool) -> None:
    """Write a checkpoint of the run ID to OUT, as a plain Hugging Face model directory.

    The checkpoint is verified first; an adapter is merged into its base. OUT appears whole or not at all.
    """
    if step not in ("best", "latest") and not step.isdecimal():
        raise click.BadParameter(f"{step!r} is neither a step nor best nor latest", param_hint="--step")
    with require_existing(f"run {run_id!r}") as workspace:
        run = workspace.runs.get(run_id)
        # torch and transformers take seconds to load; a run that is not there is refused before that.
        from hearth.training.checkpoint.export import export_checkpoint

        exported = export_checkpoint(
            run, out, step=int(step) if step.isdecimal() else step, workspace=workspace
        )
    if as_json:
        print_json({"run": run.id, "step": exported.step, "dir": str(exported.directory)})
        return
    click.echo(f"step {exported.step} of run {run.id} is in {exported.directory}")
    from hearth.cli.after_training import how_to_use

    assert run.recipe is not None
    note(how_to_use(str(exported.directory), exported.directory, run.recipe))


def _show_series(points: list[MetricPoint], as_json: bool) -> None:
    if as_json:
        print_json([{"step": p.step, "value": _finite(p.value), "time": p.time} for p in points])
    else:
        print_table(("step", "value"), ((p.step, _number(p.value)) for p in points))


def _print_metrics(points: list[MetricPoint]) -> None:
    grouped: dict[str, list[float]] = {}
    for point in points:
        grouped.setdefault(point.name, []).append(point.value)
    print_table(
        ("metric", "points", "first", "last", "lowest", "highest", "course"),
        (
            (
                row["name"],
                row["points"],
                *(_number(row[key]) for key in ("first", "last", "lowest", "highest")),
                sparkline(grouped[row["name"]]),
            )
            for row in _series_summaries(points)
        ),
    )


def _series_summaries(points: list[MetricPoint]) -> list[dict[str, Any]]:
    """One dictionary a series; numbers that are not finite become None."""
    grouped: dict[str, list[MetricPoint]] = {}
    for point in points:
        grouped.setdefault(point.name, []).append(point)
    found = []
    for name, series in sorted(grouped.items()):
        finite = [point.value for point in series if math.isfinite(point.value)]
        found.append(
            {
                "name": name,
                "points": len(series),
                "last_step": series[-1].step,
                "first": _finite(series[0].value),
                "last": _finite(series[-1].value),
                "lowest": min(finite, default=None),
                "highest": max(finite, default=None),
            }
        )
    return found


def _facts(run: Run) -> list[tuple[str, object]]:
    facts = [
        ("run", run.id),
        ("kind", run.kind),
        ("name", run.name),
        ("status", run.status),
        ("error", run.error),
        ("started", f"{run.created_at:%F %T} UTC, process {run.pid} on {run.host}"),
        ("took", _took(run)),
        ("recipe", run.recipe_hash),
        ("resumed from", run.parent),
        ("tags", ", ".join(f"{key}={value}" for key, value in run.tags.items())),
        ("folder", run.dir),
    ]
    return [(label, value) for label, value in facts if value]


def _took(run: Run) -> str:
    """How long it took, or has run; empty when nobody knows when it ended."""
    if run.finished_at is None and run.status != "running":
        return ""
    seconds = int(((run.finished_at or datetime.now(UTC)) - run.created_at).total_seconds())
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}"


def _brief(summary: dict[str, Any]) -> str:
    """The first few numbers of a summary."""
    numbers = [(k, v) for k, v in summary.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return ", ".join(f"{key} {_number(value)}" for key, value in numbers[:3])


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _flat(prefix: str, value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}.{key}"
        found.update(_flat(name, item) if isinstance(item, dict) else {name: item})
    return found
