"""Micro-batches through the model, wherever its parts are: in one process, in all of them, in stages."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hearth.errors import ConfigError
from hearth.parallel.apply import Parallelized
from hearth.parallel.pipeline import Inputs, Pipeline
from hearth.parallel.sharding import synchronize_gradients
from hearth.training.batches import SEGMENTS, Batch
from hearth.training.loss import kept_gradients, use_split_of
from hearth.training.precision import autocast
from hearth.training.totals import LossTotals, as_losses

if TYPE_CHECKING:
    from hearth.training.objectives import Losses
    from hearth.training.trainer import Trainer

Key = TypeVar("Key")
Result = TypeVar("Result")
_ROUNDS = 8  # of an evaluation, micro-batches for each process that go through a pipeline at once


class Passes:
    """Forward and backward passes of a trainer's model. Of several processes all must do the same."""

    def __init__(self, trainer: Trainer, spread: Parallelized) -> None:
        self._trainer, self.spread = trainer, spread

    def add_gradients(self, batches: Sequence[Batch], expected: Mapping[str, float]) -> LossTotals:
        """Add up the gradients of the loss of a step with these counts; the losses of this process."""
        trainer = self._trainer
        if self.spread.pipeline is not None:
            return self._through_pipeline(self.spread.pipeline, [(b, True) for b in batches], expected)
        found = LossTotals(trainer.device)
        for number, batch in enumerate(batches, 1):
            assert self.spread.module is not None
            synchronize_gradients(self.spread.module, trainer.config.parallel, last=number == len(batches))
            trainer.clock.phase("data")
            moved = batch.to(trainer.device)
            trainer.clock.phase("forward")
            losses = self._losses(moved)
            part = found.add(losses, expected)
            trainer.clock.phase("backward")
            if part.requires_grad:
                trainer.updates.backward(part)
        return found

    def add_losses(self, batches: Iterable[tuple[Batch, bool]], found: LossTotals) -> None:
        """Add the losses of these batches to ``found``, but of those that do not count (False)."""
        trainer, pipeline = self._trainer, self.spread.pipeline
        if pipeline is None:
            for batch, counts in batches:
                losses = self._losses(batch.to(trainer.device))
                found.add(losses if counts else losses.nothing())
            return
        size = _ROUNDS * trainer.config.parallel.pipeline
        given = iter(batches)
        while group := list(itertools.islice(given, size)):
            group += [(group[0][0], False)] * (-len(group) % trainer.config.parallel.pipeline)
            found.take(self._through_pipeline(pipeline, group, {}))

    def own_positions(self, batch: Batch) -> Batch:
        """What of a batch this process trains on, where positions are spread over processes."""
        context = self.spread.context
        return batch if context is None else batch.at(context.positions_Q)

    def run_model(self, function: Callable[..., Result], *inputs: Any) -> Result:
        """``function(model, *inputs)``."""
        if self.spread.module is None:
            raise ConfigError(
                f"parallel.pipeline: {self._trainer.config.train.objective} needs all of the model at once",
                fix="use parallel.shard and parallel.tensor",
            )
        result: Result = self.spread.module(function, *inputs)
        return result

    def run_on_each(
        self, function: Callable[[nn.Module, Batch], Result], batches: Iterable[tuple[Key, Batch]]
    ) -> Iterator[tuple[Key, Result]]:
        """``function(model, batch)`` for each batch, with the key that it came with; no gradients.

        In a pipeline, too, where the result must be picklable.
        """
        # Of a pipeline as many at once as there are processes: fewer do not fill a schedule.
        given, at_once = iter(batches), self._trainer.config.parallel.pipeline
        while group := list(itertools.islice(given, at_once)):
            results = self._results(function, [batch for _, batch in group])
            yield from zip((key for key, _ in group), results, strict=True)

    @torch.no_grad()
    def _results(
        self, function: Callable[[nn.Module, Batch], Result], batches: Sequence[Batch]
    ) -> list[Result]:
        trainer, pipeline = self._trainer, self.spread.pipeline
        moved = self._alike(batches)
        if pipeline is None:
            with autocast(trainer.precision, trainer.device):
                return [self.run_model(function, batch) for batch in moved]
        found: dict[int, Result] = {}

        def part_of(model: nn.Module, number: int) -> Tensor:
            use_split_of(trainer.model, model)
            if number < len(batches):
                found[number] = function(model, moved[number])
            return torch.zeros((), device=trainer.device)

        self._run(pipeline, moved + moved[:1] * (-len(moved) % trainer.config.parallel.pipeline), part_of)
        results: dict[int, Result] = pipeline.from_last(found)
        return [results[number] for number in range(len(batches))]

    def _alike(self, batches: Sequence[Batch]) -> list[Batch]:
        """On the device, and of one shape: what passes from stage to stage has one."""
        num_rows = max(len(batch.input_ids_BT) for batch in batches)
        width = max(batch.input_ids_BT.shape[1] for batch in batches)
        return [batch.padded(num_rows, width).to(self._trainer.device) for batch in batches]

    def _losses(self, batch: Batch) -> Losses:
        """The loss of a micro-batch that is on the device."""
        trainer = self._trainer

        def losses_of(model: nn.Module) -> tuple[dict[str, Tensor], Losses]:
            losses = as_losses(trainer.compute_loss(model, batch))
            return dict(losses.sums), losses

        if self.spread.context is not None:
            self.spread.context.begin(batch.extras[SEGMENTS])
        with autocast(trainer.precision, trainer.device):
            sums, losses = self.run_model(losses_of)
        return dataclasses.replace(losses, sums=sums)

    def _through_pipeline(
        self, pipeline: Pipeline, batches: Sequence[tuple[Batch, bool]], expected: Mapping[str, float]
    ) -> LossTotals:
        trainer = self._trainer
        moved = self._alike([batch for batch, _ in batches])
        found = LossTotals(trainer.device)

        def part_of(model: nn.Module, number: int) -> Tensor:
            use_split_of(trainer.model, model)
            twice = trainer.config.parallel.schedule == "zero_bubble"
            with autocast(trainer.precision, trainer.device), kept_gradients(twice):
                losses = as_losses(trainer.compute_loss(model, moved[number]))
            part = found.add(losses if batches[number][1] else losses.nothing(), expected)
            scaler = trainer.updates.scaler
            return part if scaler is None else part * scaler.factor

        trainer.clock.phase("forward")
        self._run(pipeline, moved, part_of)
        result: LossTotals = pipeline.from_last(found)
        return result

    def _run(
        self, pipeline: Pipeline, batches: Sequence[Batch], part_of: Callable[[nn.Module, int], Tensor]
    ) -> None:
        model: Any = self._trainer.model
        for stage in pipeline.stages:  # which are copies in part
            stage.train(model.training)
        with autocast(self._trainer.precision, self._trainer.device):
            pipeline.run(
                [Inputs(batch.input_ids_BT, batch.position_ids_BT) for batch in batches],
                part_of,
                hidden_size=model.config.get_text_config().hidden_size,
                dtype=next(model.parameters()).dtype,
            )
