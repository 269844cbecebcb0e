"""Trackers in a training run: told everything, never waited for, refused before any work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hearth.config import Recipe, recipe_hash
from hearth.errors import ConfigError
from hearth.training import Trainer
from hearth.training.trackers import tracking as tracking_module
from hearth.workspace import Workspace

MakeTrainer = Callable[..., Trainer]

PACKAGE = """
import json, time
from pathlib import Path
from hearth.config.section import Section
from hearth.training.trackers import Tracker

class Options(Section):
    behaviour: str = "fine"

class Own(Tracker):
    name = "own"
    options_class = Options

    def start(self, facts):
        self.file = facts.folder / "own.jsonl"
        self.write("start", run=facts.run_id, hash=facts.recipe_hash, first=facts.first_step)

    def write(self, what, **values):
        with self.file.open("a") as file:
            file.write(json.dumps({"what": what, **values}) + "\\n")

    def log(self, points):
        if self.options.behaviour == "raise":
            raise RuntimeError("the server said no")
        if self.options.behaviour == "hang":
            time.sleep(60)
        for point in points:
            self.write("log", step=point.step, values=dict(point.values))

    def artifact(self, artifact):
        self.write("artifact", kind=artifact.kind, uri=artifact.uri)

    def finish(self, status, summary, error):
        self.write("finish", status=status, loss=summary["loss"])
"""


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "site"
    (folder / "own_tracker-1.0.dist-info").mkdir(parents=True)
    (folder / "own_tracking.py").write_text(PACKAGE)
    (folder / "own_tracker-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: own-tracker\nVersion: 1.0\n"
    )
    (folder / "own_tracker-1.0.dist-info" / "entry_points.txt").write_text(
        "[hearth.trackers]\nown = own_tracking:Own\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("own_tracking", None)


def told(run: Any) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (run.dir / "own.jsonl").read_text().splitlines()]


def test_it_is_told_what_the_workspace_records(train_parts: MakeTrainer, make_recipe: Any) -> None:
    sections: dict[str, Any] = {
        "train": {"steps": 4, "evaluate_every": 2},
        "track": {"trackers": ["own"], "system_metrics_every": 60.0},
    }
    trainer = train_parts(**sections)
    run = trainer.fit()
    events = told(run)
    assert events[0] == {"what": "start", "run": run.id, "hash": recipe_hash(trainer.config), "first": 0}
    logged: dict[str, list[tuple[int, float]]] = {}
    for event in events:
        for name, value in event.get("values", {}).items():
            logged.setdefault(name, []).append((event["step"], value))
    recorded: dict[str, list[tuple[int, float]]] = {}
    for point in run.metrics():
        recorded.setdefault(point.name, []).append((point.step, point.value))
    assert {name: sorted(points) for name, points in logged.items()} == {
        name: sorted(points) for name, points in recorded.items()
    }
    assert {"loss", "eval_loss", "system/cpu_percent"} <= set(logged)
    kinds = [event["kind"] for event in events if event["what"] == "artifact"]
    assert kinds.count("model") == 1
    assert "checkpoint" in kinds
    assert events[-1] == {"what": "finish", "status": "finished", "loss": run.summary["loss"]}
    assert run.summary["trackers"]["own"]["lost"] == 0


@pytest.mark.parametrize("behaviour", ["raise", "hang"])
def test_one_that_fails_changes_nothing_of_the_run(
    train_parts: MakeTrainer,
    behaviour: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracking_module, "FINISH_SECONDS", 0.3)
    plain = train_parts().fit()
    capsys.readouterr()
    track = {"trackers": ["own"], "options": {"own": {"behaviour": behaviour}}}
    began = time.monotonic()
    run = train_parts(track=track).fit()
    assert time.monotonic() - began < 20
    assert run.status == "finished"
    assert [p.value for p in run.metrics("loss")] == [p.value for p in plain.metrics("loss")]
    delivery = run.summary["trackers"]["own"]
    assert delivery["lost"] > 0
    said = capsys.readouterr().err
    expected = (
        "failed (RuntimeError: the server said no)" if behaviour == "raise" else "did not finish in time"
    )
    assert said.count(expected) == 1


def test_refused_before_the_data_is_touched(make_recipe: Callable[..., Recipe], workspace: Workspace) -> None:
    recipe = make_recipe(track={"trackers": ["onw"]})
    with pytest.raises(ConfigError, match="no tracker 'onw'; did you mean own"):
        Trainer.from_recipe(recipe, workspace=workspace, progress=False)
    assert not (workspace.root / "datasets").exists()
    assert workspace.runs.list() == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_hides_what_it_repeats(train_parts: MakeTrainer) -> None:
    pytest.importorskip("tensorboard", reason="needs hearth-lm[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sections: dict[str, Any] = {"checkpoint": {"every": 2}, "track": {"trackers": ["tensorboard"]}}
    run = train_parts(**sections).fit()
    (run.dir / "checkpoints" / "step-000008" / "model.safetensors").write_bytes(b"broken")
    resumed = train_parts(resume=run.id, **sections).fit()
    reader = EventAccumulator(str(run.dir / "tensorboard"))
    reader.Reload()
    losses = [(event.step, event.value) for event in reader.Scalars("loss")]
    assert [step for step, _ in losses] == list(range(1, 9))
    assert [value for _, value in losses] == pytest.approx([p.value for p in resumed.metrics("loss")])
