"""One execution of a trainer: its run record, checkpoints, signals, progress, and what it leaves behind."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from hearth.config import recipe_hash, to_dict, to_yaml
from hearth.errors import ConfigError, HearthError, Interrupted, LostProcessError
from hearth.parallel.health.heartbeat import Heartbeat
from hearth.training import rng
from hearth.training.checkpoint import CheckpointSaver, CheckpointStore, Saved
from hearth.training.checkpoint.export import write_skeleton
from hearth.training.checkpoint.together import ByGroup
from hearth.training.followers import FollowedRun, NoObservers
from hearth.training.heap import kept_heap
from hearth.training.observers import Observers
from hearth.training.progress import TrainingProgress
from hearth.training.result import generation_config_of, leave_result
from hearth.training.signals import StopSignals
from hearth.training.trackers.base import EndStatus
from hearth.workspace.artifacts import write_atomically

if TYPE_CHECKING:
    from hearth.training.trainer import StepResult, Trainer
    from hearth.workspace import Run, Workspace

# The random state of a run starts apart from that of the initialisation.
_RUN_SEED_OFFSET = 0x5EED


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Session:
    """Drives ``Trainer.train_step`` from the first step, or the resumed one, to the last."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.config = trainer.config
        self._train_seconds = 0.0
        self._train_tokens = 0
        self._window_seconds = 0.0
        self._window_tokens = 0
        self._eval_loss: float | None = None
        self._last_saved: Path | None = None
        self._requested_step = -1  # of the newest save, whether it is on the disk yet or not
        self._figures: Mapping[str, float] = {}
        self._flops = trainer.facts.flops_per_token
        self._peak = trainer.peak_flops()

    def run(self) -> Run:
        """Execute, and record how it ended whatever happens."""
        trainer = self.trainer
        from hearth.workspace import Workspace

        with contextlib.ExitStack() as stack:
            stack.enter_context(kept_heap(trainer.device))
            workspace = trainer.workspace or stack.enter_context(Workspace.open())
            run = self._open_run(workspace)
            trainer.run = run
            try:
                with trainer.world.missed(self._where, fix=f"go on with: hearth train --resume {run.id}"):
                    self._execute(run)
                    summary = {**self._summary(run), **leave_result(trainer, run, workspace, self.store)}
                self.observers.end_callbacks("finished")
            except (Interrupted, KeyboardInterrupt) as error:
                self._settle(error)
                self._finish(run, "interrupted", self._summary(run), str(error) or "interrupted")
                if not isinstance(error, Interrupted) and self._last_saved is not None:
                    self._warn(f"{self._last_saved.name} is saved: hearth train --resume {run.id} goes on")
                raise
            except BaseException as error:
                self._settle(error)
                self._finish(run, "failed", self._summary(run), _first_line(error))
                raise
            self._finish(run, "finished", summary)
            return run

    def _finish(self, run: Run, status: EndStatus, summary: dict[str, Any], error: str | None = None) -> None:
        run.finish(status, summary=self.observers.end(status, summary, error), error=error)

    def _open_run(self, workspace: Workspace) -> Run:
        trainer, config, world = self.trainer, self.config, self.trainer.world
        run = self._begin_run(workspace)
        self.heart = Heartbeat(run.dir, run_id=run.id, rank=world.rank)
        self.heart.beat(trainer.state.step, "starting")
        together = ByGroup(world.savers) if world.size > 1 else None
        keep = config.checkpoint.keep
        self.store = CheckpointStore(run.dir, keep=keep, warn=self._warn, together=together)
        # What rests on a disk has no room on the host.
        background = config.checkpoint.async_ and config.parallel.offload != "nvme"
        self.saver = CheckpointSaver(self.store, background=background, say=self._say)
        try:
            trainer.start_objective(run.dir)
            trainer.identity  # noqa: B018 - hashes the tokenizer now, not while a step waits
            world.on_main(lambda: self._write_skeleton(run.dir / "skeleton"))
            if trainer._resume is not None:
                self._load(run)
            else:
                rng.seed_everything(config.train.seed + _RUN_SEED_OFFSET)
            # Also of a resumed run: the command that goes on must go on with what was changed then.
            if world.is_main:
                write_atomically(run.dir / "recipe.yaml", to_yaml(config))
                workspace.lineage.add(f"dataset:{trainer.dataset_fingerprint}", f"run:{run.id}", "trained")
                self.observers = Observers(trainer, run, workspace, warn=self._warn)
            else:
                self.observers = cast(Observers, NoObservers())
        except BaseException as error:
            run.finish("interrupted" if trainer._resume else "failed", error=_first_line(error))
            raise
        return run

    def _begin_run(self, workspace: Workspace) -> Run:
        """The record of this run, made or taken up by the main process."""
        trainer, config, world = self.trainer, self.config, self.trainer.world
        made: list[Run] = []

        def begin() -> str:
            if trainer._resume is not None:
                made.append(workspace.runs.resume(trainer._resume))
            else:
                run = workspace.runs.create(
                    "train",
                    name=config.track.name or f"{config.train.objective}",
                    recipe=to_dict(config),
                    recipe_hash=recipe_hash(config),
                    tags=dict(config.track.tags),
                )
                made.append(run)
            return made[0].id

        run_id = world.on_main(begin)
        return made[0] if made else cast("Run", FollowedRun(run_id, workspace.runs.get(run_id).dir))

    def _write_skeleton(self, directory: Path) -> None:
        trainer = self.trainer
        if not directory.is_dir():
            generation = generation_config_of(trainer, trainer.model)
            write_skeleton(trainer.model, trainer.tokenizer, generation, directory)

    def _load(self, run: Run) -> None:
        checkpoint = self.store.load_newest()
        self.trainer.load_checkpoint(checkpoint)
        inexact = self.trainer.identity.inexact(checkpoint)
        if inexact and self.trainer.world.is_main:
            self._warn(f"the run does not go on bit for bit as it would have: {', '.join(inexact)}")
        best_step = self.trainer.state.best_step
        self.trainer.world.on_main(lambda: self.store.resume_from(checkpoint.step, best_step=best_step))
        self._last_saved, self._requested_step = checkpoint.path, checkpoint.step
        run.discard_metrics_after(checkpoint.step)

    def _warn(self, message: str) -> None:
        if not self.trainer.world.is_main:
            return
        TrainingProgress(first_step=0, total_steps=0, enabled=False).warn(message)

    def _say(self, message: str) -> None:
        self.progress.say(message)

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────

    def _execute(self, run: Run) -> None:
        trainer = self.trainer
        with (
            TrainingProgress(
                first_step=trainer.state.step,
                total_steps=trainer.total_steps,
                enabled=trainer._show_progress and trainer.world.is_main,
            ) as progress,
            StopSignals(self._on_signal),
        ):
            self.progress = progress
            self._announce(run)
            self.observers.callbacks.start(trainer, run)
            stopped_early = self._out_of_patience()  # of a run that was killed once it had stopped
            while trainer.state.step < trainer.total_steps and not stopped_early:
                result = trainer.train_step(trainer.state.step)
                stopped_early = self._after_step(run, result)
                stopping = trainer._stop_reason is not None and trainer.state.step < trainer.total_steps
                if trainer.world.any(stopping or self.observers.callbacks.error is not None):
                    self._stop(run)
            self.heart.beat(trainer.state.step, "finishing")
            self._evaluate_at_end(run)
            if self._requested_step != trainer.state.step:
                self._save(run, last=True)
            self._record_saved(self.saver.wait())
            self.observers.callbacks.raise_error()

    def _announce(self, run: Run) -> None:
        plan = self.trainer.plan()  # by all: it may have to find out the size of micro-batches
        if not self.trainer.world.is_main:
            return
        start = f"going on from step {self.trainer.state.step}, " if self.trainer.state.step else ""
        self.progress.say(
            f"run {run.id}: {start}{plan.num_parameters / 1e6:.2f} M parameters"
            + (
                f" ({plan.num_trainable_parameters / 1e6:.2f} M train)"
                if plan.num_trainable_parameters != plan.num_parameters
                else ""
            )
            + f", {plan.num_rows} rows of {plan.sequence_length} tokens, {plan.steps} steps of "
            f"{plan.batch_size} rows ({plan.epochs:.2f} epochs), {plan.precision} on {plan.device}"
        )
        if self.config.train.evaluate_every and not plan.num_eval_rows:
            self.progress.warn(
                "nothing is held out, so nothing is evaluated or stops early: see data.validation_fraction"
            )
        limit = f"too long for data.sequence_length {self.config.data.sequence_length}"
        if plan.num_dropped:
            fix = "raise it" if self.config.data.truncate else "raise it, or set data.truncate"
            self.progress.warn(f"{plan.num_dropped} documents are left out, {limit}: {fix}")
        if plan.num_truncated:
            self.progress.warn(f"{plan.num_truncated} documents are cut off, {limit}")

    def _where(self) -> str:
        step, total = self.trainer.state.step, self.trainer.total_steps
        return f"step {step + 1} of {total}" if step < total else f"what follows the last of {total} steps"

    def _on_signal(self, name: str) -> None:
        self.trainer.request_stop(name)
        if not self.trainer.world.is_main:
            return
        self.progress.say(f"{name}: finishing the step and saving; once more stops at once without saving")

    def _after_step(self, run: Run, result: StepResult) -> bool:
        """Record, evaluate, save. True when training should end early."""
        trainer, section = self.trainer, self.config.train
        state = trainer.state
        state.step += 1
        if result.skipped:
            state.num_skipped_steps += 1
            state.skipped_in_a_row += 1
            self.observers.log_metrics({"skipped_steps": state.num_skipped_steps}, step=state.step)
            self.progress.warn(f"the update is skipped: {result.skipped}")
        else:
            state.num_tokens += result.num_tokens
            state.last_loss = result.loss
            state.skipped_in_a_row = 0
        times = trainer.clock.seconds  # what comes before the first collective is this process's own work
        own = times["data"][-1] + times["forward"][-1] if times["data"] else None
        self.heart.beat(state.step, "training", own)
        self._record_saved(self.saver.poll())
        self._train_seconds += result.seconds
        self._train_tokens += result.num_tokens
        self._window_seconds += result.seconds
        self._window_tokens += result.num_tokens
        due = state.step % section.log_every == 0 or state.step == trainer.total_steps
        if due and not result.skipped:
            rate = self._window_tokens / self._window_seconds
            figures = {
                "loss": result.loss,
                "lr": result.lr,
                "grad_norm": result.grad_norm,
                "tokens_per_second": rate,
                "mfu": rate * self._flops / self._peak,
                **result.metrics,
            }
            self.observers.log_metrics(figures, step=state.step)
            self.progress.step(state.step, {**figures, "eval_loss": self._eval_loss})
            self._window_seconds, self._window_tokens = 0.0, 0
        self.observers.callbacks.step(trainer, state.step, vars(result))
        improved = False
        if section.evaluate_every and state.step % section.evaluate_every == 0:
            improved = self._evaluate()
        every = self.config.checkpoint.every
        if improved or (every and state.step % every == 0):
            self._save(run, best=improved)
        return self._out_of_patience()

    def _out_of_patience(self) -> bool:
        state, patience = self.trainer.state, self.config.train.early_stopping_patience
        if not patience or state.evaluations_without_improvement < patience:
            return False
        self.progress.say(
            f"stopping early: no improvement over {state.best_metric} (step {state.best_step}) in "
            f"{patience} evaluations"
        )
        return True

    def _evaluate(self) -> bool:
        """Evaluate and record; True when the result is the best so far."""
        trainer = self.trainer
        state = trainer.state
        with trainer.clock.apart("evaluation"), self.heart.during(state.step, "evaluating"):
            figures = trainer.evaluate()
        if not figures:
            return False
        self._eval_loss = figures["eval_loss"]
        state.last_eval_loss = self._eval_loss if math.isfinite(self._eval_loss) else None
        state.last_eval_step = state.step
        self.observers.log_metrics(figures, step=state.step)
        self._figures = figures
        improved = self._is_better(figures)
        if improved:
            state.best_metric, state.best_step = figures[self.config.checkpoint.best_metric], state.step
            state.best_of = self._best_of
            state.evaluations_without_improvement = 0
        else:
            state.evaluations_without_improvement += 1
        self.observers.callbacks.evaluate(trainer, state.step, figures)
        return improved

    @property
    def _best_of(self) -> str:
        return f"{self.config.checkpoint.best_mode} {self.config.checkpoint.best_metric}"

    def _is_better(self, figures: Mapping[str, float]) -> bool:
        checkpoint, state = self.config.checkpoint, self.trainer.state
        best = state.best_metric if state.best_of == self._best_of else None  # no other metric compares
        if checkpoint.best_metric not in figures:
            assert self.trainer.run is not None
            self.trainer.state.last_eval_step = -1  # a resumed run evaluates again
            self._save(self.trainer.run, last=True)  # the work so far is worth keeping
            raise ConfigError(
                f"checkpoint.best_metric {checkpoint.best_metric!r} is not measured; measured are "
                f"{', '.join(sorted(figures))}",
                fix=f"go on with: hearth train --resume {self.trainer.run.id} "
                "checkpoint.best_metric=eval_loss",
            )
        value, margin = figures[checkpoint.best_metric], self.config.train.early_stopping_min_delta
        if best is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < best - margin if checkpoint.best_mode == "min" else value > best + margin

    def _evaluate_at_end(self, run: Run) -> None:
        state = self.trainer.state
        if state.last_eval_step != state.step and self._evaluate():
            self._save(run, best=True, last=True)

    # ── saving and stopping ──────────────────────────────────────────────────────────────────────────────

    def _save(self, run: Run, *, best: bool = False, last: bool = False) -> None:
        trainer = self.trainer
        step = trainer.state.step

        def contents() -> Any:
            run.flush()  # no checkpoint without the metrics that led to it
            return trainer.checkpoint_contents()

        evaluated = self._figures if trainer.state.last_eval_step == step else None
        with trainer.clock.apart("checkpoint"), self.heart.during(step, "saving"):
            self.saver.save(step, contents, metrics=evaluated, best=best, last=last)
        self._requested_step = step
        self._record_saved(self.saver.poll())

    def _record_saved(self, saved: list[Saved]) -> None:
        """Tell of checkpoints that are on the disk now."""
        for each in saved:
            self._last_saved = each.path
            self.observers.log_metrics(each.metrics(), step=each.step)
            self.observers.saved(each.step, each.path)

    def _settle(self, error: BaseException) -> None:
        """End with the save under way: wait for it, except where somebody wants to stop at once."""
        if isinstance(error, LostProcessError):
            return  # a save that all write would wait for the one that is lost
        if isinstance(error, KeyboardInterrupt):
            self.saver.cancel()
            return
        try:
            self._record_saved(self.saver.wait())
        except Exception as failed:  # noqa: BLE001 - the run ends with the error that came first
            if failed is not error:
                self._warn(_first_line(failed))

    def _stop(self, run: Run) -> None:
        trainer = self.trainer
        if self._requested_step != trainer.state.step:
            self._save(run, last=True)
        self._record_saved(self.saver.wait())
        self.observers.callbacks.raise_error()
        reason = trainer._stop_reason or "another process"
        raise Interrupted(
            f"stopped after step {trainer.state.step} of {trainer.total_steps} ({reason}); checkpoint saved",
            fix=f"go on with: hearth train --resume {run.id}",
        )

    def _summary(self, run: Run) -> dict[str, Any]:
        trainer = self.trainer
        state = trainer.state
        rate = self._train_tokens / self._train_seconds if self._train_seconds else None
        best = self.store.best()
        return {
            "steps": state.step,
            "micro_batch_size": state.micro_batch_size or self.config.train.micro_batch_size,
            "num_tokens": state.num_tokens,
            "epochs": state.step * self.config.train.batch_size / len(trainer.rows),
            "loss": state.last_loss,
            "eval_loss": state.last_eval_loss,
            f"best_{self.config.checkpoint.best_metric}": state.best_metric,
            "best_step": state.best_step or None,
            "skipped_steps": state.num_skipped_steps,
            "tokens_per_second": rate,
            "mfu": None if rate is None else rate * self._flops / self._peak,
            "flops_per_token": self._flops,
            "peak_flops": self._peak,
            "train_seconds": self._train_seconds,
            "peak_memory_bytes": peak_memory_bytes(trainer.device),
            "num_parameters": trainer.facts.num_parameters,
            "precision": trainer.precision,
            "device": str(trainer.device),
            "dataset_fingerprint": trainer.dataset_fingerprint,
            "dataset_dir": trainer.dataset_dir,
            "last_checkpoint": self._last_saved.name
            if self._last_saved
            else run.summary.get("last_checkpoint"),
            "best_checkpoint": best.name if best else None,
        }


def _first_line(error: BaseException) -> str:
    text = error.message if isinstance(error, HearthError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0] if text else type(error).__name__
