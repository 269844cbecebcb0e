"""`hearth train` as a user runs it: results, plans, Ctrl-C, kill -9, resume, bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hearth.cli.main import main

WORDS = [
    "the",
    "dog",
    "cat",
    "bird",
    "sees",
    "hears",
    "finds",
    "small",
    "red",
    "old",
    "house",
    "tree",
    "river",
    "and",
    "then",
    "slowly",
]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of seconds over 120 small documents."""
    rng = random.Random(3)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(8, 60)))}) for _ in range(120)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "model": {"size": "100K", "context_length": 64},
        "tokenizer": {"vocab_size": 320},
        "data": {
            "sources": [{"path": "docs.jsonl", "format": "jsonl"}],
            "validation_fraction": 0.1,
            "sequence_length": 32,
            "num_workers": 1,
        },
        "train": {"steps": 6, "batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["train", *args])
    return int(caught.value.code or 0)


def test_json_is_the_summary_and_nothing_else(
    recipe: Path, workspace_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(str(recipe), "train.steps=3", "--json") == 0
    out = capsys.readouterr()
    summary = json.loads(out.out)
    assert (summary["steps"], summary["status"]) == (3, "finished")
    assert Path(summary["model_dir"], "model.safetensors").is_file()
    assert "3 steps of 4 rows" in out.err
    run_dir = workspace_dir / "runs" / summary["run"]
    assert (run_dir / "recipe.yaml").is_file()


def test_dry_run_trains_nothing(
    recipe: Path, workspace_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(str(recipe), "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_parameters"] == pytest.approx(100_000, rel=0.03)
    assert plan["steps"] == 6
    assert plan["tokens_per_step"] == 128
    assert not list((workspace_dir / "runs").glob("*"))
    assert call(str(recipe), "--dry-run") == 0
    assert "rows" in capsys.readouterr().out


def test_what_cannot_fit_is_refused_before_it_starts(
    recipe: Path, workspace_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(str(recipe), "model.size=2T", "train.optimizer=adamw8bit") == 2
    error = capsys.readouterr().err
    assert "this run does not fit: a process needs" in error
    assert "fix: " in error
    assert not list(workspace_dir.glob("datasets/*"))
    assert not list(workspace_dir.glob("runs/*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no recipe given"),
        (("{recipe}", "train.stepps=3"), "stepps"),
        (("{recipe}", "train.steps=many"), "train.steps"),
        (("absent.yaml",), "absent.yaml"),
        (("{recipe}", "--resume", "nope"), "no run 'nope'"),
        (("--resume", "nope"), "no run 'nope'"),
        (("{recipe}", "model.size=ten"), "model.size"),
    ],
)
def test_bad_input_exits_2(
    recipe: Path, workspace_dir: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    assert call(*(arg.format(recipe=recipe) for arg in args)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_resume_without_a_recipe_uses_that_of_the_run(
    recipe: Path, workspace_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(str(recipe), "--json")
    run = json.loads(capsys.readouterr().out)["run"]
    assert call("--resume", run, "train.steps=9", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 9
    # What was changed stays changed: the command that a stopped run prints has no overrides.
    assert call("--resume", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 9
    stored = yaml.safe_load((workspace_dir / "runs" / run / "recipe.yaml").read_text())
    assert stored["train"]["steps"] == 9


def test_a_dataset_prepared_under_a_name_is_found_by_it(
    recipe: Path, workspace_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["data", "prepare", str(recipe), "--name", "words", "--json"])
    fingerprint = json.loads(capsys.readouterr().out)["fingerprint"]
    named = (str(recipe), "data.sources=[]", "data.dataset=words", "train.steps=1", "--json")
    assert call(*named) == 0
    assert json.loads(capsys.readouterr().out)["dataset_fingerprint"] == fingerprint
    assert call(*named, "data.dataset=wordy") == 2
    assert "the workspace has words" in capsys.readouterr().err


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(recipe: Path, workspace_dir: Path) -> Any:
    """Start `hearth train` in a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def launch(*args: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "HEARTH_HOME": str(workspace_dir), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "hearth", "train", *args],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for_checkpoint(workspace: Path, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        names = [path.name for path in workspace.glob("runs/*/checkpoints/step-*")]
        if any(not name.endswith(".tmp") and int(name[5:]) >= step for name in names):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("no checkpoint in 120 s")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(
    recipe: Path, workspace_dir: Path, start: Start, number: signal.Signals
) -> None:
    process = start(str(recipe), "train.steps=100000", "checkpoint.every=5")
    wait_for_checkpoint(workspace_dir, process, 5)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    run = next((workspace_dir / "runs").iterdir()).name
    assert f"hearth train --resume {run}" in error
    saved = (workspace_dir / "runs" / run / "latest").read_text().strip()
    assert f"stopped after step {int(saved[5:])} of 100000" in error
    assert "Traceback" not in error
    resumed = start("--resume", run, f"train.steps={int(saved[5:]) + 2}", "--json")
    out, error = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, error
    assert json.loads(out)["steps"] == int(saved[5:]) + 2


@pytest.mark.slow
def test_kill_and_resume_equals_an_undisturbed_run(recipe: Path, workspace_dir: Path, start: Start) -> None:
    arguments = ("train.steps=150", "checkpoint.every=7", "train.evaluate_every=20")
    straight = start(str(recipe), *arguments, "--json")
    out, error = straight.communicate(timeout=200)
    assert straight.returncode == 0, error
    reference = json.loads(out)
    before = set((workspace_dir / "runs").iterdir())
    process = start(str(recipe), *arguments)
    deadline = time.monotonic() + 120
    while not any((path / "latest").exists() for path in set((workspace_dir / "runs").iterdir()) - before):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (run,) = set((workspace_dir / "runs").iterdir()) - before
    resumed = start("--resume", run.name, "--json")
    out, error = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, error
    result = json.loads(out)
    for key in ("steps", "num_tokens", "loss", "eval_loss", "best_eval_loss"):
        assert result[key] == reference[key], key
    same = [Path(summary["model_dir"], "model.safetensors").read_bytes() for summary in (reference, result)]
    assert same[0] == same[1]
