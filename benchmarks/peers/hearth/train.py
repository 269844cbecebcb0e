"""Hearth in the training benchmark: `hearth.Trainer` on the prepared dataset, as a recipe would run it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from job import Job, Meter, work


def fit(job: Job, meter: Meter, scratch: Path, callback: Any) -> None:
    from hearth.config import Recipe
    from hearth.data import Dataset
    from hearth.training import Trainer
    from hearth.workspace import Workspace

    recipe = Recipe.model_validate(job.settings["recipe"])
    model = job.model()
    meter.start()
    with Workspace.open(scratch) as workspace:
        trainer = Trainer(
            model=model,
            train_dataset=Dataset.open(Path(job.settings["dataset"])),
            config=recipe,
            workspace=workspace,
            progress=False,
            callbacks=[callback],
        )
        run = trainer.fit()
        meter.extra["performance"] = json.loads((run.dir / "performance.json").read_text())
        seconds, stalls = run.metrics("checkpoint_seconds"), run.metrics("checkpoint_stall_seconds")
    for whole, stall in zip(seconds, stalls, strict=True):
        if whole.step < job.settings["steps"]:  # the one at the end has nothing to go on with
            meter.saves.append({"seconds": whole.value, "stall": stall.value})


def train(job: Job, meter: Meter, scratch: Path) -> None:
    from hearth.training import Callback

    class Metered(Callback):
        def on_step(self, trainer: Any, step: int, metrics: Any) -> None:  # noqa: ARG002
            meter.step()
            meter.losses.append(metrics["loss"])

    fit(job, meter, scratch, Metered())


def overhead(job: Job, meter: Meter, scratch: Path) -> None:
    """After each step of the loop the same step again without it, on the same model and optimizer.

    Bare is what cannot be left out: forward and backward by the same loss on batches that lie ready, the
    norm of the gradients and their clipping by torch, the optimizer, the loss as a number.
    """
    import torch

    from hearth.training import Callback
    from hearth.training.batches import collate
    from hearth.training.loss import token_loss_sum
    from hearth.training.precision import autocast

    def batches_of(trainer: Any, step: int) -> list[Any]:
        rows, size = trainer.step_rows(step), trainer.micro_batch_size
        cut = [rows[first : first + size] for first in range(0, len(rows), size)]
        return [collate(trainer.rows, some).to(trainer.device) for some in cut]

    def now() -> float:
        if job.settings["device"] == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    class Paired(Callback):
        pairs: list[tuple[float, float]] = []  # noqa: RUF012 - one instance
        went_on = 0.0

        def on_start(self, trainer: Any, run: Any) -> None:  # noqa: ARG002
            self.went_on = now()

        def on_step(self, trainer: Any, step: int, metrics: Any) -> None:
            whole = now() - self.went_on
            meter.step()
            meter.losses.append(metrics["loss"])
            with trainer.clock.apart("evaluation"):  # no part of the loop's own account
                batches = batches_of(trainer, step - 1)
                started = now()
                self.bare(trainer, batches)
                self.pairs.append((whole, now() - started))
            self.went_on = now()

        def bare(self, trainer: Any, batches: list[Any]) -> float:
            model, optimizer = trainer.model, trainer.optimizer
            num_valid = sum(batch.num_valid for batch in batches)
            total = torch.zeros((), device=trainer.device)
            for batch in batches:
                with autocast(trainer.precision, trainer.device):
                    summed, _ = token_loss_sum(model, batch)
                loss = summed / num_valid
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.settings["grad_clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(total)

    callback = Paired()
    fit(job, meter, scratch, callback)
    meter.extra["pairs"] = callback.pairs


if __name__ == "__main__":
    work({"hearth": train, "overhead": overhead}, ("hearth-lm", "transformers", "torch"))
