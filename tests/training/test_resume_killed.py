"""Killed fifty times, in the middle of saves and anywhere else, a run ends as if nobody had touched it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hearth.config import Recipe
from hearth.training import CheckpointStore
from hearth.workspace import Workspace

KILLS = 50
TIMED = {"system", "tokens_per_second", "mfu", "checkpoint_seconds", "checkpoint_stall_seconds"}

# Imports once, and forks a process for every attempt: only they open the workspace, train and die.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from hearth.config import Recipe
from hearth.training import Callback, CheckpointStore, Trainer
from hearth.workspace import Workspace

recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
straight, killed = Path(sys.argv[2]), Path(sys.argv[3])
num_kills = int(sys.argv[4])

class Recording(Trainer):
    def compute_loss(self, model, batch):
        self.seen.extend(batch.rows)
        return super().compute_loss(model, batch)

class Log(Callback):
    def __init__(self, root):
        self.file = os.open(root / "steps.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def on_step(self, trainer, step, metrics):
        figures = [metrics[name].hex() for name in ("loss", "grad_norm", "lr")]
        rows, trainer.seen = trainer.seen, []
        os.write(self.file, (json.dumps([step, figures, rows]) + "\\n").encode())
    def on_evaluate(self, trainer, step, figures):
        trainer.seen = []

def train(root):
    with Workspace.open(root / "workspace") as workspace:
        found = workspace.runs.list()
        has_checkpoint = found and CheckpointStore(found[0].dir).list()
        trainer = Trainer.from_recipe(
            recipe, workspace=workspace, resume=found[0].id if has_checkpoint else None,
            progress=False, callbacks=[Log(root)], device="cpu",
        )
        trainer.__class__, trainer.seen = Recording, []
        trainer.fit()

def start(root):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        train(root)
        status = 0
    finally:
        os._exit(status)

def checkpoints():
    return next(iter((killed / "workspace" / "runs").glob("*/checkpoints")), None)

def newest(folder):
    names = [] if folder is None else [p.name for p in folder.iterdir() if p.suffix == "" ]
    return max((int(name[5:]) for name in names), default=0)

def torn(folder):
    return [] if folder is None else [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]

def wait(child, condition):
    while not condition():
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            sys.exit(f"a process ended by itself with {status} after {len(kills)} kills")
        time.sleep(0.0005)

kills = []
for root in (straight, killed):
    root.mkdir()
child = start(straight)
assert os.waitpid(child, 0)[1] == 0
rng = random.Random(4)
best_known = 0
for kill in range(num_kills):
    child = start(killed)
    goal = best_known + rng.choice([0, 1, 1, 2])
    if kill == 0:
        goal = 2  # something must be there to go on from
    wait(child, lambda: newest(checkpoints()) >= goal)
    if kill % 2:
        # Only a save that begins now is torn where we choose.
        before = newest(checkpoints())
        wait(child, lambda: any(n.startswith("step-") and int(n[5:11]) > before for n in torn(checkpoints())))
        time.sleep(rng.uniform(0, 0.008))
    else:
        size = lambda: (killed / "steps.log").stat().st_size
        start_size = size()
        wait(child, lambda: size() > start_size)
        time.sleep(rng.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = torn(checkpoints())
    said = []
    found = CheckpointStore(checkpoints().parent, warn=said.append).load_newest()
    assert not said, said
    assert found.step >= best_known, (found.step, best_known)
    best_known = found.step
    kills.append([found.step, left])
child = start(killed)
assert os.waitpid(child, 0)[1] == 0
print(json.dumps(kills))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_fifty_times(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64, "attention_dropout": 0.1}
    recipe = make_recipe(
        model={"size": None, "context_length": None, "config": shape},
        train={"steps": 400, "evaluate_every": 20, "evaluate_rows": 4, "learning_rate": 1e-3},
        checkpoint={"every": 1},
    )
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json(by_alias=True))
    (tmp_path / "driver.py").write_text(DRIVER)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    arguments = [tmp_path / "driver.py", tmp_path / "recipe.json", straight, killed, KILLS]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills = json.loads(done.stdout.splitlines()[-1])
    assert len(kills) == KILLS
    num_torn = sum(bool(left) for _, left in kills)
    assert num_torn >= KILLS // 3, f"only {num_torn} saves were torn"

    expected = steps_of(straight)
    assert {step: len(found) for step, found in expected.items()} == dict.fromkeys(range(1, 401), 1)
    found = steps_of(killed)
    assert set(found) == set(expected)
    for step, several in found.items():  # also the steps that a kill has lost and that were taken again
        assert several == expected[step] * len(several), step
    assert sum(map(len, found.values())) > 400
    assert last_state(killed) == last_state(straight)


def steps_of(root: Path) -> dict[int, list[Any]]:
    """Loss, norm, rate and rows of every time that a step was taken."""
    found: dict[int, list[Any]] = {}
    for line in (root / "steps.log").read_text().splitlines():
        step, figures, rows = json.loads(line)
        found.setdefault(step, []).append((figures, rows))
    return found


def last_state(root: Path) -> tuple[Any, ...]:
    """The last checkpoint and the exported weights byte by byte, and all metrics."""
    with Workspace.open(root / "workspace") as workspace:
        (run,) = workspace.runs.list()
        assert run.status == "finished"
        names = [p for p in run.metrics() if p.name.split("/")[0] not in TIMED]
        metrics = [(p.step, p.name, p.value) for p in names]
        checkpoint = CheckpointStore(run.dir).load_newest().path
        files = {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir())}
        best = (run.dir / "best").read_text()
        return metrics, files, best, (run.dir / "model" / "model.safetensors").read_bytes()
