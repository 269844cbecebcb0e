"""Each tracker with its real library: what was written is read back with the library's own reader."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hearth.config import Recipe, recipe_hash
from hearth.training.trackers import Tracking, make_trackers, run_facts
from hearth.workspace import Run, Workspace

# Warnings of the libraries among themselves, which we can do nothing about.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*noload.*"),
]


@pytest.fixture(autouse=True)
def _no_accounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "COMET_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)  # whatever a library drops into the current directory


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.model_validate({"train": {"steps": 4, "learning_rate": 0.25}, "track": {"name": "my run"}})


def record(
    workspace: Workspace, recipe: Recipe, name: str, options: dict[str, Any] | None = None
) -> tuple[Run, dict[str, Any]]:
    """A run of three steps that is interrupted after two, resumed at one, and finished."""
    said: list[str] = []
    run = workspace.runs.create("train", name="my run", tags={"team": "blue"})
    for first, last, status in ((0, 2, "interrupted"), (1, 3, "finished")):
        if first:
            run = workspace.runs.resume(run.id)
            run.discard_metrics_after(first)
        trackers = make_trackers([name], {name: options or {}})
        facts = run_facts(run, recipe, workspace=workspace.root, first_step=first, resumed=first > 0)
        tracking = Tracking(run, trackers, facts, warn=said.append, finish_seconds=120)
        for step in range(first + 1, last + 1):
            tracking.log_metrics({"loss": 10.0 - step, "lr": 0.5}, step=step)
        tracking.log_metrics({"system/cpu_percent": 50.0}, step=last)
        (run.dir / f"step-{last}").mkdir()
        (run.dir / f"step-{last}" / "manifest.json").write_text("{}")
        tracking.artifact("model", run.dir / "gone", step=last)  # pruned before the tracker saw it
        tracking.artifact("checkpoint", run.dir / f"step-{last}", step=last, sha256="ab" * 32)
        error = "stopped by hand" if status == "interrupted" else None
        delivery = tracking.finish(status, {"loss": 10.0 - last, "device": "cpu"}, error)  # type: ignore[arg-type]
        run.finish(status, summary={"trackers": delivery})  # type: ignore[arg-type]
        assert said == []
        assert delivery[name]["lost"] == 0
    assert [p.step for p in run.metrics("loss")] == [1, 2, 3]
    return run, delivery


def test_tensorboard(workspace: Workspace, recipe: Recipe) -> None:
    pytest.importorskip("tensorboard", reason="needs hearth-lm[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = record(workspace, recipe, "tensorboard")
    reader = EventAccumulator(str(run.dir / "tensorboard"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert [event.value for event in reader.Scalars("system/cpu_percent")][-1] == 50.0

    def text(tag: str) -> list[str]:
        return [event.tensor_proto.string_val[0].decode() for event in reader.Tensors(f"{tag}/text_summary")]

    assert text("recipe_hash") == [recipe_hash(recipe)]
    assert "learning_rate: 0.25" in text("recipe")[0]
    assert text("tag/team") == ["blue"]
    assert text("status")[-1] == "finished"
    assert text("artifact/checkpoint")[-1] == (run.dir / "step-3").as_uri()


def test_tensorboard_in_a_folder_of_the_users(workspace: Workspace, recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs hearth-lm[tensorboard]")
    run, _ = record(workspace, recipe, "tensorboard", {"log_dir": str(tmp_path / "boards")})
    assert len(list((tmp_path / "boards" / run.id).glob("events.out.*"))) == 2


def test_mlflow(workspace: Workspace, recipe: Recipe) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs hearth-lm[mlflow]")
    run, _ = record(workspace, recipe, "mlflow", {"experiment": "mine"})
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workspace.root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    (found,) = client.search_runs([experiment.experiment_id])  # one: the resumed run is the same
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "my run"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {(point.step, point.value) for point in history} == {(1, 9.0), (2, 8.0), (3, 7.0)}
    assert found.data.metrics["system/cpu_percent"] == 50.0
    assert found.data.metrics["summary/loss"] == 7.0
    assert found.data.params["train.learning_rate"] == "0.25"
    tags = found.data.tags
    assert tags["hearth.run_id"] == run.id
    assert tags["hearth.recipe_hash"] == recipe_hash(recipe)
    assert tags["team"] == "blue"
    assert tags["hearth.checkpoint"] == (run.dir / "step-3").as_uri()
    assert tags["hearth.checkpoint.sha256"] == "ab" * 32
    kept = list((workspace.root / "mlflow-artifacts").rglob("recipe.yaml"))
    assert len(kept) == 1
    assert "learning_rate: 0.25" in kept[0].read_text()


def leveldb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file, which is a log in LevelDB's format after seven bytes of its own."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield parts
            parts = b""


def wandb_records(folder: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for raw in leveldb_records(file):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(raw)
            found.append(message)
    return found


def values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_offline(workspace: Workspace, recipe: Recipe) -> None:
    pytest.importorskip("wandb", reason="needs hearth-lm[wandb]")
    run, _ = record(workspace, recipe, "wandb", {"project": "mine"})
    records = wandb_records(run.dir)
    opened = [r.run for r in records if r.HasField("run")]
    assert {r.run_id for r in opened} == {run.id}
    assert {r.project for r in opened} == {"mine"}
    assert opened[0].display_name == "my run"
    assert list(opened[0].tags) == ["team=blue"]
    config = values(opened[0].config.update)
    assert config["train"]["learning_rate"] == 0.25
    assert config["recipe_hash"] == recipe_hash(recipe)
    rows = [values(r.history.item) for r in records if r.HasField("history")]
    steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert steps == [(1, 9.0), (2, 8.0), (2, 8.0), (3, 7.0)]  # both processes; no step was dropped
    assert {row["system/cpu_percent"] for row in rows if "system/cpu_percent" in row} == {50.0}
    summaries: dict[str, Any] = {}
    for message in records:
        if message.HasField("summary"):
            summaries |= values(message.summary.update)
    assert summaries["status"] == "finished"
    assert summaries["error"] == "stopped by hand"
    made = [r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")]
    made += [r.artifact for r in records if r.HasField("artifact")]
    assert any((run.dir / "step-3").as_uri() in artifact.metadata for artifact in made)
    references = [entry.ref for artifact in made for entry in artifact.manifest.contents]
    assert (run.dir / "step-3" / "manifest.json").as_uri() in references
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1, 0]


def test_comet_offline(workspace: Workspace, recipe: Recipe) -> None:
    comet_ml = pytest.importorskip("comet_ml", reason="needs hearth-lm[comet]")
    run, _ = record(workspace, recipe, "comet", {"project": "mine"})
    archives = sorted((run.dir / "comet").glob("*.zip"), key=lambda path: path.stat().st_mtime)
    assert len(archives) == 2
    key = comet_ml.get_experiment_key(run.id)
    messages: list[dict[str, Any]] = []
    for archive in archives:
        assert archive.name.startswith(key)
        with zipfile.ZipFile(archive) as opened:
            experiment = json.loads(opened.read("experiment.json"))
            assert experiment["offline_id"] == key
            messages += [json.loads(line) for line in opened.read("messages.json").splitlines()]
    metrics = [m["payload"] for m in messages if m["type"] == "metric_msg"]
    points = [
        (m["metric"]["step"], m["metric"]["metricValue"])
        for m in metrics
        if m["metric"]["metricName"] == "loss"
    ]
    assert points == [(1, 9.0), (2, 8.0), (2, 8.0), (3, 7.0)]
    text = json.dumps(messages)
    assert recipe_hash(recipe) in text
    assert "train.learning_rate" in text
    assert (run.dir / "step-3").as_uri() in text
    assert '"finished"' in text


def test_several_at_once_and_numbers_that_are_not(workspace: Workspace, recipe: Recipe) -> None:
    pytest.importorskip("tensorboard", reason="needs hearth-lm[tensorboard]")
    pytest.importorskip("wandb", reason="needs hearth-lm[wandb]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = workspace.runs.create("train", name="both")
    facts = run_facts(run, recipe, workspace=workspace.root, first_step=0, resumed=False)
    said: list[str] = []
    tracking = Tracking(
        run, make_trackers(["tensorboard", "wandb"]), facts, warn=said.append, finish_seconds=120
    )
    for step, loss in ((1, math.nan), (2, math.inf), (3, 1.0)):
        tracking.log_metrics({"loss": loss}, step=step)
    assert tracking.finish("failed", {"loss": math.nan}, "loss nan in step 1") == {
        "tensorboard": {"delivered": 3, "lost": 0},
        "wandb": {"delivered": 3, "lost": 0},
    }
    run.finish("failed")
    reader = EventAccumulator(str(run.dir / "tensorboard"))
    reader.Reload()
    assert [str(event.value) for event in reader.Scalars("loss")] == ["nan", "inf", "1.0"]
    assert [r.exit.exit_code for r in wandb_records(run.dir) if r.HasField("exit")] == [1]
    assert said == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlflow", {"tracking_uri": "http://127.0.0.1:9"}),
        ("mlflow", {"tracking_uri": "sqlite:////proc/no/x.db"}),
    ],
)
def test_a_server_that_cannot_be_reached(
    workspace: Workspace, recipe: Recipe, name: str, options: dict[str, Any]
) -> None:
    pytest.importorskip("mlflow", reason="needs hearth-lm[mlflow]")
    run = workspace.runs.create("train", name="lonely")
    facts = run_facts(run, recipe, workspace=workspace.root, first_step=0, resumed=False)
    said: list[str] = []
    tracking = Tracking(
        run, make_trackers([name], {name: options}), facts, warn=said.append, finish_seconds=1
    )
    for step in range(1, 101):
        tracking.log_metrics({"loss": float(step)}, step=step)
    delivery = tracking.finish("finished", {}, None)
    run.finish("finished", summary={"trackers": delivery})
    assert delivery[name]["delivered"] == 0
    assert delivery[name]["lost"] == 100
    assert 1 <= len(said) <= 2
    assert len(run.metrics("loss")) == 100


LONELY = """
import time
from hearth.config import Recipe
from hearth.training.trackers import Tracking, make_trackers, run_facts
from hearth.workspace import Workspace

with Workspace.open() as workspace:
    run = workspace.runs.create("train", name="lonely")
    facts = run_facts(run, Recipe(), workspace=workspace.root, first_step=0, resumed=False)
    tracking = Tracking(run, make_trackers(["wandb"]), facts, warn=lambda _text: None, finish_seconds=3)
    tracking.log_metrics({"loss": 1.0}, step=1)
    time.sleep(1)
    tracking.finish("finished", {}, None)
    run.finish("finished")
print(time.time())
"""


@pytest.mark.slow
def test_a_process_ends_although_the_server_of_wandb_cannot_be_reached(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs hearth-lm[wandb]")
    server = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": "online"}
    environment = {**os.environ, **server, "HEARTH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LONELY], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.time() - float(done.stdout.splitlines()[-1]) < 45  # W&B alone: 95
