"""The training loop.

One optimizer step: take the rows of the step, cut them into micro-batches, add up the gradients of the *sum*
of their losses divided by what counts in the whole step (tokens, pairs, answers), check that loss and
gradient norm are finite, clip, step. Everything that decides what comes next is in the checkpoint; the order
of the data and the learning rate are functions of the step.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hearth.config.recipe import Recipe
from hearth.errors import ConfigError, DataError, TrainingError
from hearth.models import peak_flops
from hearth.parallel.apply import parallelize
from hearth.parallel.completeness import inventory, require_complete
from hearth.parallel.world import World
from hearth.training import rng
from hearth.training.batches import Batch, fingerprint_of, row_at, step_rows
from hearth.training.callbacks import Callback
from hearth.training.checkpoint import Checkpoint, Contents, Counters, Stateful, Weights, collect, restore
from hearth.training.execution import set_up_execution
from hearth.training.facts import ModelFacts
from hearth.training.fitting import memory_of_process, refuse_what_cannot_fit
from hearth.training.identity import Identity, common_facts, identity_of
from hearth.training.loss import use_split_of
from hearth.training.micro_batch import choose_micro_batch
from hearth.training.nonfinite import skip_or_raise
from hearth.training.objectives import Losses, make_objective
from hearth.training.observers import own_callbacks
from hearth.training.optimizers import trainable_parameters
from hearth.training.optimizers.groups import resolve_settings
from hearth.training.parallel_checks import check_recipe, check_spreadable, common_things
from hearth.training.passes import Passes
from hearth.training.performance import StepClock
from hearth.training.plan import TrainingPlan, resolve_steps, too_long
from hearth.training.precision import choose_device, choose_precision, compute_dtype
from hearth.training.progress import TrainingProgress
from hearth.training.samples import Sample
from hearth.training.schedule import learning_rate_at
from hearth.training.shares import own_turns
from hearth.training.timing import median_step_seconds
from hearth.training.totals import LossTotals, add_up
from hearth.training.trackers import Tracking, make_trackers
from hearth.training.updates import make_updates

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from hearth.models.in_parts import InParts
    from hearth.workspace import Run, Workspace


Result = TypeVar("Result")
_READ = "tokens read"  # beside the counts of an objective


@dataclass
class TrainingState(Counters):
    """What a checkpoint must know besides tensors."""

    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # tokens of those steps, without padding
    best_metric: float | None = None  # the best value yet of checkpoint.best_metric
    best_of: str = ""  # which metric that was, and whether less of it is better
    best_step: int = 0
    evaluations_without_improvement: int = 0
    last_eval_loss: float | None = None
    last_eval_step: int = -1
    last_loss: float | None = None
    num_skipped_steps: int = 0  # updates that were not made, as something was not finite
    skipped_in_a_row: int = 0  # the latest of them
    micro_batch_size: int = 0  # what auto has found


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave."""

    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)  # what the objective measured
    skipped: str = ""  # why the update was not made


class Trainer:
    """Trains any causal language model of transformers. ``from_recipe`` builds one from a recipe.

    ``train_dataset`` and ``eval_dataset``: a ``hearth.data.Dataset`` (its train and validation splits), one
    split, or a sequence of packed rows. ``config``: a recipe; its ``train``, ``data``, ``checkpoint`` and
    ``track`` sections apply. Override ``compute_loss`` for a loss of your own.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast | None = None,
        train_dataset: Any,
        eval_dataset: Any = None,
        config: Recipe | None = None,
        workspace: Workspace | None = None,
        resume: str | None = None,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        device: str | torch.device | None = None,
        base_reference: str | None = None,
        world: World | None = None,
        in_parts: InParts | None = None,
    ) -> None:
        self.config = config or Recipe()
        make_trackers(self.config.track.trackers, self.config.track.options)  # refused before any work
        self.model = model
        self.tokenizer = tokenizer
        self.workspace = workspace
        self.callbacks = tuple(callbacks)
        self.base_reference = base_reference
        self.device = choose_device(device) if world is None else world.device
        self.world = world or World.alone(self.device)
        check_recipe(self.config, self.world)
        self.precision = choose_precision(self.config.train.precision, self.device)
        self.objective = make_objective(self.config)
        self._take_data(train_dataset, eval_dataset)
        self.world.require_same(common_things(self))
        self.state = TrainingState()
        self.run: Run | None = None
        self.clock = StepClock(self.device)
        self.tracking: Tracking | None = None  # while the run goes on
        own_callbacks(self)  # refuses what cannot be before anything is built
        self._resume = resume
        self._show_progress = progress
        self._progress: TrainingProgress | None = None
        self._stop_reason: str | None = None
        self._objective_started = False
        self._spread_model(in_parts)
        self.optimizer = self.updates.optimizer
        self.stateful: dict[str, Stateful] = self._stateful()

    def _take_data(self, train_dataset: Any, eval_dataset: Any) -> None:
        """The rows of both splits, and how many steps they give."""
        section = self.config.train
        self.objective.check(train_dataset)
        rows = self.objective.rows(train_dataset, "train")
        if rows is None or len(rows) == 0:
            raise _no_rows(too_long(rows)[0], self.config.data.sequence_length)
        self.rows = rows
        self.eval_rows = self.objective.rows(eval_dataset, "validation")
        self.dataset_fingerprint = fingerprint_of(train_dataset, rows)
        directory = getattr(train_dataset, "path", None)
        self.dataset_dir = None if directory is None else str(directory)
        self.total_steps = resolve_steps(
            steps=section.steps, epochs=section.epochs, rows=len(rows), batch_size=section.batch_size
        )

    def _spread_model(self, in_parts: InParts | None) -> None:
        """Set the model up as the recipe says, spread it over processes, and make what changes it."""
        section = self.config.train
        check_spreadable(self.config, self.model, self._sequence_length())
        if in_parts is None and self.config.parallel.engine == "native":  # DeepSpeed moves weight by weight
            self.model.to(self.device)
        elif in_parts is not None:
            use_split_of(in_parts.twin, self.model)
        if not trainable_parameters(self.model):
            raise ConfigError("no weight of the model trains", fix="unfreeze some, or add model.adapter")
        notice = set_up_execution(self.model, section, precision=self.precision, device=self.device)
        # Of the whole model, and before it is spread: it freezes what the groups freeze.
        settings = resolve_settings(self.model, section.parameter_groups, weight_decay=section.weight_decay)
        self.facts = ModelFacts.of(self.model, self._sequence_length())
        before = inventory(self.model)
        spread = parallelize(
            self.model,
            self.world,
            self.config.parallel,
            sequence_length=self._sequence_length(),
            source=None if in_parts is None else in_parts.source,
            compute=compute_dtype(self.precision),
        )
        if self.config.parallel.engine == "native":
            require_complete(before, self.model, spread.runs, self.world)
        self.passes = Passes(self, spread)
        self.updates = make_updates(
            spread.module,
            self.model,
            section,
            precision=self.precision,
            settings=settings,
            saved_weights=self._saved_weights,
        )
        if notice is not None:
            TrainingProgress(first_step=0, total_steps=0, enabled=False).warn(notice)

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        *,
        workspace: Workspace | None = None,
        resume: str | None = None,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        device: str | torch.device | None = None,
        world: World | None = None,
    ) -> Trainer:
        """Prepare the data and build the model that a recipe describes. ``resume`` is the id of a run.

        ``world``: the processes that train together, from ``hearth.parallel.world.joined``.

        Raises InputError (ConfigError, DataError, ModelError) for a recipe that cannot work. Data is prepared
        in the workspace's ``datasets/`` and reused while its inputs are unchanged.
        """
        from hearth.training.assemble import assemble

        make_trackers(recipe.track.trackers, recipe.track.options)  # refused before any work
        here = world or World.alone(choose_device(device))
        here.require_same({**common_facts(recipe), "--resume": resume})
        check_recipe(recipe, here)
        refuse_what_cannot_fit(recipe, here, workspace=workspace)
        shown = progress and here.is_main
        parts = here.main_first(
            lambda: assemble(
                recipe,
                workspace=workspace,
                progress=shown,
                in_parts=here.layout.spreads_weights or recipe.parallel.engine == "deepspeed",
            )
        )
        return cls(
            model=parts.model,
            tokenizer=parts.tokenizer,
            train_dataset=parts.dataset,
            eval_dataset=parts.dataset if parts.has_validation else None,
            config=recipe,
            workspace=parts.workspace,
            resume=resume,
            progress=progress,
            callbacks=callbacks,
            device=device,
            base_reference=parts.base_reference,
            world=world,
            in_parts=parts.in_parts,
        )

    # ── what a user may override or call ─────────────────────────────────────────────────────────────────

    def compute_loss(self, model: nn.Module, batch: Batch) -> Losses | tuple[Tensor, int]:
        """The loss of a micro-batch: the sum of its token losses and the number of tokens it sums over.

        The loop divides by the number of tokens of the whole step, so do not average here. An objective with
        several sums gives a `Losses`.
        """
        return self.objective.loss(model, batch)

    def request_stop(self, reason: str = "asked to stop") -> None:
        """Stop after the current step, with a checkpoint; ``fit`` then raises Interrupted."""
        self._stop_reason = reason

    def plan(self) -> TrainingPlan:
        """What ``fit`` would do, in numbers."""
        section, length = self.config.train, self._sequence_length()
        model: Any = self.model
        return TrainingPlan(
            objective=section.objective,
            architecture=str(model.config.model_type),
            num_parameters=self.facts.num_parameters,
            num_trainable_parameters=self.facts.num_trainable_parameters,
            num_rows=len(self.rows),
            num_eval_rows=self._num_eval_rows(),
            sequence_length=length,
            steps=self.total_steps,
            batch_size=section.batch_size,
            micro_batch_size=self.micro_batch_size,
            tokens_per_step=section.batch_size * length,
            total_tokens=self.total_steps * section.batch_size * length,
            epochs=self.total_steps * section.batch_size / len(self.rows),
            precision=self.precision,
            device=str(self.device),
            flops_per_token=self.facts.flops_per_token,
            num_processes=self.world.size,
            memory_bytes=memory_of_process(self, length),
            dataset=self.dataset_fingerprint,
            num_dropped=too_long(self.rows)[0],
            num_truncated=too_long(self.rows)[1],
        )

    def fit(self) -> Run:
        """Train to the end and return the run; its summary has the figures and the paths.

        Raises Interrupted after Ctrl-C (a checkpoint is saved), NonFiniteError before the optimizer sees a
        NaN, StorageError when a checkpoint cannot be written. The run records how it ended. With
        ``register.name`` the result is registered; the ``evaluate`` section and ``register.aliases`` are the
        work of `hearth train`, here call ``hearth.evaluation`` and ``workspace.registry.promote``.
        """
        from hearth.training.session import Session

        before = rng.capture()
        try:
            return Session(self).run()
        finally:
            rng.restore(*before)

    def start_objective(self, run_dir: Path | None = None) -> None:
        """Let the objective prepare what it needs of the weights that training starts from, once."""
        if not self._objective_started:
            self.objective.start(self, run_dir)
            self._objective_started = True

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────

    def train_step(self, step: int) -> StepResult:
        """Optimizer step ``step``, counted from 0. Raises NonFiniteError before any weight changes."""
        started = time.perf_counter()
        self.clock.phase("data")
        self.start_objective()
        given = self.objective.batches(self, step, self.step_rows(step))
        batches = [self.passes.own_positions(batch) for batch in given]
        counts = add_up(self.objective.counts(batch) for batch in batches)
        read = {_READ: float(sum(batch.num_tokens for batch in batches))}
        expected = self.world.sum_counts(counts | read)
        num_tokens = int(expected.pop(_READ))
        if not any(expected.values()):
            raise TrainingError(
                f"no token counts in step {step + 1}: every label of its rows is masked",
                fix="look at `hearth data inspect RECIPE --masks`; where data.truncate cuts the answers "
                "off raise data.sequence_length, where they are few train.batch_size",
            )
        lr = self.learning_rate(step)
        self.model.train()
        total, metrics = self._accumulate(batches, expected)
        self.clock.phase("optimizer")
        norm = self.world.whole_norm(self.updates.norm())
        loss, grad_norm = torch.stack([total, norm.to(total.device)]).tolist()
        skipped = self.updates.overflow(loss, grad_norm)
        if not skipped and not (math.isfinite(loss) and math.isfinite(grad_norm)):
            skipped = skip_or_raise(self, step, batches, loss, grad_norm)
        if not skipped:
            self.updates.apply(lr, norm)
        self.updates.discard()
        seconds = time.perf_counter() - started
        self.clock.step_done(num_tokens)
        return StepResult(loss, grad_norm, lr, num_tokens, seconds, metrics, skipped)

    def _accumulate(
        self, batches: Sequence[Batch], expected: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Add up the gradients of the loss of the step; the loss itself, and the means of its metrics."""
        found = self.passes.add_gradients(batches, expected)
        found.reduce(self.world)
        factor = found.correction(expected)
        if factor != 1.0:
            self.updates.scale(factor)
        return found.mean(), found.metric_means()

    def run_model(self, function: Callable[..., Result], *inputs: Any) -> Result:
        """``function(model, *inputs)``. Whatever runs the model must go through here or ``passes``: it may be
        spread over processes, all of which must do the same then.
        """
        return self.passes.run_model(function, *inputs)

    def learning_rate(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        section = self.config.train
        return learning_rate_at(
            step,
            total_steps=self.total_steps,
            peak=section.learning_rate,
            shape=section.schedule,
            warmup_steps=min(section.warmup_steps, self.total_steps),
            min_ratio=section.min_lr_ratio,
            decay_fraction=section.decay_fraction,
            decay_shape=section.decay_shape,
        )

    def step_rows(self, step: int) -> list[int]:
        """The rows of optimizer step ``step``, counted from 0, in order."""
        section = self.config.train
        return step_rows(
            step,
            batch_size=section.batch_size,
            seed=section.seed,
            num_rows=len(self.rows),
            changes_by_epoch=getattr(self.rows, "changes_by_epoch", False),
        )

    @property
    def micro_batch_size(self) -> int:
        """Rows of one forward and backward pass; with auto, found at first use and kept in checkpoints."""
        size = self.config.train.micro_batch_size
        if size != "auto":
            return size
        if not self.state.micro_batch_size:
            self.start_objective()
            self.state.micro_batch_size = choose_micro_batch(self).size
        return self.state.micro_batch_size

    # ── evaluation ───────────────────────────────────────────────────────────────────────────────────────

    def _num_eval_rows(self) -> int:
        available = 0 if self.eval_rows is None else len(self.eval_rows)
        wanted = self.config.train.evaluate_rows
        return min(available, wanted) if wanted else available

    def evaluate(self) -> dict[str, float]:
        """``eval_loss``, in nats, and what else the objective measures on the held-out rows; {} without any.

        The random state stays as it was. With ``train.ema_decay`` the averaged weights are measured.
        """
        if self.eval_rows is None or self._num_eval_rows() == 0:
            return {}
        self.start_objective()
        num_rows = self._num_eval_rows()
        # A limited evaluation takes rows from all over the split, always the same ones.
        rows = [row_at(index, seed=0, num_rows=len(self.eval_rows)) for index in range(num_rows)]
        found = LossTotals(self.device)
        self.model.eval()
        with torch.no_grad(), self.updates.averaged():
            self._evaluate_batches(self.objective.evaluation_batches(self, self.eval_rows, rows), found)
        found.reduce(self.world)
        self.model.train()
        if not found.any:
            return {}
        figures = {"eval_loss": float(found.mean())}
        return figures | {f"eval_{name}": value for name, value in found.metric_means().items()}

    def _evaluate_batches(self, batches: Iterable[Batch], found: LossTotals) -> None:
        """Add up the losses of this process's share; all processes run the model equally often."""
        turns = own_turns(self.world, batches)
        self.passes.add_losses(((self.passes.own_positions(batch), counts) for batch, counts in turns), found)

    def loss_of(self, batch: Batch) -> Tensor:
        """The loss of a batch alone, wherever its model is."""
        found = LossTotals(self.device)
        self.passes.add_losses([(self.passes.own_positions(batch), True)], found)
        return found.mean()

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────

    def _stateful(self) -> dict[str, Stateful]:
        """What a checkpoint holds. Who has more state adds itself; an objective does so in `start`."""
        return {
            "model": Weights(self._saved_weights),
            **self.updates.parts(),
            "training": self.state,
            "rng": rng.RandomState(self.world, lambda: self.config.train.seed + self.state.step),
        }

    @functools.cached_property
    def identity(self) -> Identity:
        """What a checkpoint must share with this trainer."""
        return identity_of(self)

    def checkpoint_contents(self) -> tuple[Contents, dict[str, Any]]:
        """The state of all parts, which continues this run exactly, and what it belongs to."""
        consumed = self.state.step * self.config.train.batch_size
        about = {
            "data": {
                "fingerprint": self.dataset_fingerprint,
                "seed": self.config.train.seed,
                "epoch": consumed // len(self.rows),
                "rows_consumed": consumed,
            },
            "total_steps": self.total_steps,
            **self.identity.as_dict(),
        }
        return collect(self.stateful).own_part(self.world), about

    def _saved_weights(self) -> dict[str, Tensor]:
        """What training changes: with an adapter only the adapter, the base is immutable."""
        if self.config.model.adapter is not None:
            return dict(trainable_parameters(self.model))
        buffers = dict(self.model.named_buffers())
        persistent = {name: buffers[name] for name in self.model.state_dict() if name in buffers}
        return {**dict(self.model.named_parameters()), **persistent}

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. Raises ConfigError when data, tokenizer or model differ."""
        self.identity.require_match(checkpoint)
        restore(self.stateful, checkpoint, absent_weights=self.facts.names - set(self.model.state_dict()))

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """The weights of a checkpoint, nothing else."""
        Weights(self._saved_weights).load_state_tensors(checkpoint.tensors["model"])
        if self.updates.average is not None:
            self.updates.average.load_state_tensors(checkpoint.tensors["average"])

    # ── figures ──────────────────────────────────────────────────────────────────────────────────────────

    def _sequence_length(self) -> int:
        row = self.rows[0]
        if isinstance(row, Sample):
            return self.config.data.sequence_length
        return len(row["input_ids"] if isinstance(row, dict) else row.input_ids)

    def peak_flops(self) -> float:
        """What the device could do, for MFU: in float32, or in 16 bits (of which fp8 is a share, too)."""
        return peak_flops(self.device, torch.float32 if self.precision == "fp32" else torch.bfloat16)

    def measure_step_seconds(self, num_steps: int = 3) -> float:
        """Median seconds of an optimizer step, after one to warm up; nothing of them stays."""
        return median_step_seconds(self, num_steps)


def _no_rows(num_dropped: int, sequence_length: int) -> DataError:
    if num_dropped:
        return DataError(
            f"the training split has no rows: all {num_dropped} conversations are longer than "
            f"data.sequence_length {sequence_length}",
            fix="raise data.sequence_length, or set data.truncate",
        )
    return DataError("the training split has no rows", fix="add documents to data.sources")


def measure_step_seconds(
    target: Trainer | Recipe, num_steps: int = 3, *, workspace: Workspace | None = None
) -> float:
    """Seconds that one optimizer step of a trainer or a recipe takes here; nothing is kept of the trial."""
    if isinstance(target, Trainer):
        return target.measure_step_seconds(num_steps)
    trainer = Trainer.from_recipe(target, workspace=workspace, progress=False)
    return trainer.measure_step_seconds(num_steps)
