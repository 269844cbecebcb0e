from __future__ import annotations

import json
import math

import pytest

from hearth.cli.sparkline import sparkline
from hearth.workspace import Workspace


@pytest.fixture
def two_runs(workspace_dir):
    with Workspace.open() as workspace:
        ids = []
        for name, rate in (("slow", 0.1), ("fast", 0.2)):
            run = workspace.runs.create(
                "train", name=name, recipe={"train": {"lr": rate, "steps": 4}}, tags={"note": "[x]"}
            )
            for step in range(4):
                run.log_metrics({"loss": 4.0 - step * rate, "bad": math.nan}, step=step)
            run.finish(summary={"final_loss": 1.25, "name": name})
            ids.append(run.id)
        workspace.runs.create("eval", name="broken").finish("failed", error="out of [memory]")
    return ids


def test_list(hearth, two_runs):
    result = hearth("runs", "list")
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split()[2] for line in lines[1:]] == ["broken", "fast", "slow"]
    assert "final_loss 1.25" in lines[2]
    listed = hearth("runs", "list", "--json", "--kind", "train", "--limit", "1").json
    assert [run["name"] for run in listed] == ["fast"]
    assert [r["name"] for r in hearth("runs", "list", "--status", "failed", "--json").json] == ["broken"]
    assert "no runs match" in hearth("runs", "list", "--kind", "demo").err
    assert hearth("runs", "list", "--status", "lost").code == 2


def test_show(hearth, two_runs):
    result = hearth("runs", "show", two_runs[0][:6])
    assert result.code == 0
    assert f"run         {two_runs[0]}" in result.out
    assert "tags        note=[x]" in result.out
    (loss,) = [line for line in result.out.splitlines() if line.startswith("loss")]
    assert loss.split() == ["loss", "4", "4", "3.7", "3.7", "4", "█▆▃▁"]
    (bad,) = [line for line in result.out.splitlines() if line.startswith("bad")]
    assert bad.split()[-1] == "!!!!"
    shown = hearth("runs", "show", two_runs[0], "--json").json
    assert shown["recipe"] == {"train": {"lr": 0.1, "steps": 4}}
    assert {m["name"]: m["last"] for m in shown["metrics"]} == {"loss": pytest.approx(3.7), "bad": None}


def test_one_metric(hearth, two_runs):
    series = hearth("runs", "show", two_runs[1], "--metric", "loss", "--json").json
    assert [point["step"] for point in series] == [0, 1, 2, 3]
    assert [point["value"] for point in series] == pytest.approx([4.0, 3.8, 3.6, 3.4])
    bad = hearth("runs", "show", two_runs[1], "--metric", "bad", "--json")
    assert [point["value"] for point in json.loads(bad.out, parse_constant=pytest.fail)] == [None] * 4
    assert hearth("runs", "show", two_runs[1], "--metric", "loss").out.splitlines()[1].split() == ["0", "4"]
    result = hearth("runs", "show", two_runs[1], "--metric", "none")
    assert result.code == 2
    assert "has no metric 'none'" in result.err


def test_compare(hearth, two_runs):
    result = hearth("runs", "compare", *two_runs, "--json").json
    assert result["runs"] == two_runs
    rows = result["rows"]
    assert list(rows["recipe.train.lr"].values()) == [0.1, 0.2]
    assert "recipe.train.steps" not in rows, "equal parts of the recipes are left out"
    assert list(rows["metrics.loss"].values()) == pytest.approx([3.7, 3.4])
    assert list(rows["summary.final_loss"].values()) == [1.25, 1.25]
    assert "recipe.train.lr" in hearth("runs", "compare", *two_runs).out
    assert hearth("runs", "compare", two_runs[0]).code == 2
    assert hearth("runs", "compare", two_runs[0], "nope").code == 2


def test_a_failed_run_shows_its_error(hearth, two_runs):
    (broken,) = hearth("runs", "list", "--status", "failed", "--json").json
    assert "error       out of [memory]" in hearth("runs", "show", broken["id"]).out


def test_an_interrupted_run_with_a_checkpoint_says_how_to_go_on(hearth, workspace_dir):
    with Workspace.open() as workspace:
        run = workspace.runs.create("train", name="x")
        run.finish("interrupted")
    assert "--resume" not in hearth("runs", "show", run.id).err
    (run.dir / "latest").write_text("step-000001")
    assert f"hearth train --resume {run.id}" in hearth("runs", "show", run.id).err


def test_nothing_yet(hearth, workspace_dir):
    result = hearth("runs", "list")
    assert (result.code, result.out) == (0, "")
    assert "there is no workspace at" in result.err
    assert "hearth train" in result.err
    assert hearth("runs", "list", "--json").json == []
    for words in (("show", "x"), ("compare", "x", "y")):
        result = hearth("runs", *words)
        assert result.code == 2
        assert "there is no workspace" in result.err
    assert not workspace_dir.exists()
    Workspace.open().close()
    assert "no runs yet" in hearth("runs", "list").err


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 5, ""),
        ([1.0], 5, "▁"),
        ([3.0, 3.0, 3.0], 5, "▁▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([7, 7, 0, 0], 2, "█▁"),
        ([0.0, math.nan, 1.0], 3, "▁!█"),
        ([0.0, math.inf], 2, "▁!"),
        ([math.nan, math.nan], 2, "!!"),
        ([-1e308, 1e308], 2, "▁█"),
    ],
)
def test_sparkline(values, width, drawn):
    assert sparkline(values, width) == drawn


def test_a_long_series_fits_its_width():
    assert len(sparkline([float(i) for i in range(1000)], 32)) == 32
