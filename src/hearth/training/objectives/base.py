"""What every objective is: a pure loss over one shared normalisation core.

An objective gives *sums*, each under the name of what is counted ("tokens", "pairs", …). The loop divides
every sum by the count of the whole optimizer step and adds the quotients up, so that the result does not
depend on how a step is cut into micro-batches, how sequences are packed into rows, or over how many processes
it is spread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hearth.errors import ConfigError
from hearth.training.batches import Batch, Rows, as_rows, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hearth.config.recipe import Recipe
    from hearth.training.trainer import Trainer
    from hearth.workspace import Workspace

TOKENS = "tokens"


@dataclass(frozen=True)
class Losses:
    """The loss of one micro-batch.

    ``sums``: differentiable scalars by unit. ``counts``: how many of each unit were summed. ``metrics``: by
    name, a sum and how many it is of; the mean over the step is recorded.
    """

    sums: Mapping[str, Tensor]
    counts: Mapping[str, float]
    metrics: Mapping[str, tuple[Tensor | float, float]] = field(default_factory=dict)

    @classmethod
    def of_tokens(cls, loss: Tensor, num_tokens: float) -> Losses:
        """The loss of an objective that only counts tokens."""
        return cls({TOKENS: loss}, {TOKENS: num_tokens})

    def nothing(self) -> Losses:
        """The same units and metrics, of nothing."""
        return Losses(
            {unit: torch.zeros_like(loss) for unit, loss in self.sums.items()},
            dict.fromkeys(self.counts, 0.0),
            dict.fromkeys(self.metrics, (0.0, 0.0)),
        )

    def __iter__(self) -> Iterator[Any]:
        """``loss, num_tokens = losses`` where there is one sum alone."""
        if len(self.sums) != 1:
            raise TypeError(f"this loss has several sums: {', '.join(self.sums)}; read .sums and .counts")
        (unit,) = self.sums
        return iter((self.sums[unit], self.counts[unit]))


class Objective:
    """Reads its settings from the recipe; `loss` is all that a subclass must have."""

    name = ""
    # The sections of `train` for some objectives that this one looks at; None: whatever is given.
    sections: ClassVar[frozenset[str] | None] = None
    kind = "text"  # the rows it trains on: text (packed rows), preference, feedback or prompts

    def __init__(self, config: Recipe) -> None:
        self.config = config

    def check(self, dataset: Any) -> None:
        """Raise ConfigError when the data cannot serve the objective; called before anything is built."""

    def refuse(self, why: str, *dimensions: str) -> None:
        """Raise ConfigError where ``parallel`` has more than one process in one of these dimensions."""
        for name in dimensions:
            size = getattr(self.config.parallel, name)
            if size > 1:
                raise ConfigError(
                    f"parallel.{name} is {size}, but {self.name} {why}",
                    fix="use parallel.data, parallel.shard or parallel.tensor",
                )

    def rows(self, dataset: Any, split: str) -> Rows | None:
        """The rows of a split that `batch_size` counts; None for None. Default: packed rows of tokens."""
        data = self.config.data
        return as_rows(
            dataset,
            split=split,
            sequence_length=data.sequence_length,
            packing=data.packing,
            seed=data.seed,
            truncate=data.truncate,
            fim=data.fim if split == "train" else None,
        )

    def start(self, trainer: Trainer, run_dir: Path | None) -> None:
        """Called once, with the weights that training starts from and before a checkpoint is loaded.

        ``run_dir`` is where what was computed may be kept; None where there is no run.
        """

    def adapt_dataset(self, dataset: Any, workspace: Workspace, *, progress: bool) -> Any:  # noqa: ARG002
        """The data set that is trained on, given the one of the recipe. Default: that one."""
        return dataset

    def adapt_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model that trains, given the causal language model of the recipe. Default: that one."""
        return model

    def batches(self, trainer: Trainer, step: int, indices: Sequence[int]) -> list[Batch]:  # noqa: ARG002
        """The micro-batches of an optimizer step over these rows, on the CPU: those of this process.

        ``indices`` are the rows of all processes. Overridden where something must be known of the whole step
        first, such as rollouts.
        """
        return list(self.micro_batches(trainer, trainer.rows, trainer.world.share(indices)))

    def evaluation_batches(self, trainer: Trainer, rows: Rows, indices: Sequence[int]) -> Iterable[Batch]:
        """The micro-batches of an evaluation over these held-out rows, on the CPU."""
        return self.micro_batches(trainer, rows, indices)

    def micro_batches(self, trainer: Trainer, rows: Rows, indices: Sequence[int]) -> Iterator[Batch]:
        """These rows in groups of the trainer's micro-batch size."""
        size = trainer.micro_batch_size
        for first in range(0, len(indices), size):
            yield self.collate(rows, indices[first : first + size])

    def collate(self, rows: Rows, indices: Sequence[int]) -> Batch:
        """A micro-batch of these rows."""
        return self.prepare(collate(rows, indices))

    def prepare(self, batch: Batch) -> Batch:
        """Choose the labels of a batch. Default: as the data has them."""
        return batch

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """What a micro-batch adds to the counts of its step; known without running the model."""
        return {TOKENS: batch.num_valid}

    def loss(self, model: nn.Module, batch: Batch) -> Losses:
        """The sums of a micro-batch."""
        raise NotImplementedError
