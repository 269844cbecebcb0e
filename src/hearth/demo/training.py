"""The training stages of the demo: as many steps as the minutes allow, or a run that is already there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.config import Recipe
from hearth.demo.plan import steps_within

if TYPE_CHECKING:
    from hearth.workspace import Run, Workspace

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainingStage:
    """What one stage trains: ``make_recipe`` takes the number of steps, ``key`` names the work for reuse."""

    name: str
    key: str
    make_recipe: Callable[[int], Recipe]
    seconds: float
    num_rows: int
    max_epochs: float


def train(stage: TrainingStage, workspace: Workspace, say: Say) -> tuple[Run, bool]:
    """Train, go on with an interrupted run, or reuse a finished one; the second value says "reused"."""
    from hearth.training import Trainer, measure_step_seconds

    for run in workspace.runs.list(kind="train"):
        if run.tags.get("demo") != stage.key:
            continue
        if run.status == "finished" and model_directory(run).is_dir():
            say(f"reusing run {run.id}: the corpus, the settings and the minutes are unchanged")
            return run, True
        if run.status == "interrupted" and run.recipe is not None and (run.dir / "latest").exists():
            say(f"going on with run {run.id}, which was interrupted")
            recipe = Recipe.model_validate(run.recipe)
            return Trainer.from_recipe(recipe, workspace=workspace, resume=run.id).fit(), False
    trial = stage.make_recipe(1000)
    seconds_per_step = measure_step_seconds(trial, workspace=workspace)
    steps = steps_within(
        stage.seconds,
        seconds_per_step,
        rows=stage.num_rows,
        batch_size=trial.train.batch_size,
        epochs=stage.max_epochs,
    )
    say(f"{steps} steps of {seconds_per_step:.2f} s: about {steps * seconds_per_step / 60:.1f} minutes")
    recipe = stage.make_recipe(steps)
    tagged = recipe.model_copy(
        update={"track": recipe.track.model_copy(update={"tags": {"demo": stage.key}})}
    )
    return Trainer.from_recipe(tagged, workspace=workspace).fit(), False


def model_directory(run: Run) -> Path:
    """Where a run leaves its model."""
    return run.dir / "model"


def training_facts(run: Run) -> dict[str, Any]:
    """The figures of a run that the demo's report shows."""
    keys = ("steps", "num_tokens", "epochs", "tokens_per_second", "mfu", "eval_loss", "loss")
    return {"run": run.id} | {key: run.summary.get(key) for key in keys}
