"""What is to be trained, as far as memory and time depend on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from hearth.errors import ConfigError

if TYPE_CHECKING:
    from hearth.config.recipe import AdapterSection, Recipe

Precision = Literal["fp32", "bf16", "fp16", "fp8"]
Checkpointing = Literal["none", "selective", "full"]
Optimizer = Literal["adamw", "adafactor", "lion", "muon", "adamw8bit"]

# Objectives whose step is one forward and backward pass over its rows, and nothing else that is large.
_PLAIN = ("pretrain", "sft")
_PAIRS = ("dpo", "ipo", "kto", "orpo", "simpo")


@dataclass(frozen=True)
class Job:
    """The settings of a run. ``batch_size`` counts rows of an optimizer step over all processes.

    ``isolated``: rows hold several documents, so that attention has a mask (data.packing).
    The last fields say how a framework works. The defaults are Hearth's: float32 weights, of which those of
    layers are gathered in the type of autocast, a loss that makes its logits in chunks, and processes of a
    sequence that share the state where it is shared at all.
    """

    sequence_length: int
    batch_size: int
    micro_batch_size: int
    optimizer: Optimizer = "adamw"
    precision: Precision = "bf16"
    checkpointing: Checkpointing = "none"
    averaged: bool = False
    compiled: bool = False
    isolated: bool = True
    adapter: AdapterSection | None = None
    whole: frozenset[str] = frozenset()  # dimensions over which the objective does not spread
    background_checkpoints: bool = False
    gathers_bf16: bool = False  # all weights are gathered in bfloat16, those of embedding and output, too
    chunked_loss: bool = True
    vocabulary_split: bool = True  # tensor parallelism divides embedding and output layer by words
    alternate_products: bool = False  # selective checkpointing keeps every second product (torchtitan)
    eager_attention: bool = False  # scores and probabilities in memory, as before FlashAttention
    context_always_shares: bool = False  # processes of a sequence share the state, whatever else (torchtitan)
    tensor_overlap: float = 0.0  # share of tensor parallelism's communication that is hidden
    bf16_reduce: bool = False  # gradients cross the wire in bfloat16 (parallel.reduce)
    bf16_state: bool = False  # bfloat16 weights with a float32 copy in the optimizer (Megatron)

    @property
    def width(self) -> int:
        """Bytes of the type that products are computed in."""
        return 4 if self.precision == "fp32" else 2

    @functools.cached_property
    def one_row(self) -> Job:
        """The same job with nothing that a cut of the step changes: what tables are kept by."""
        return replace(self, batch_size=1, micro_batch_size=1, checkpointing="none")

    def with_(self, **changes: object) -> Job:
        """The same with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]


def job_of_recipe(recipe: Recipe, *, precision: Precision = "bf16", device: str = "cuda") -> Job:
    """The settings of a recipe. ``precision``: what ``train.precision: auto`` means on the hardware.

    A micro-batch of ``auto`` is planned as one row: the planner tries larger ones by itself.
    """
    train = recipe.train
    asked = train.precision
    return Job(
        sequence_length=recipe.data.sequence_length,
        batch_size=train.batch_size,
        micro_batch_size=1 if train.micro_batch_size == "auto" else train.micro_batch_size,
        optimizer=train.optimizer,
        precision=precision if asked == "auto" else asked,
        checkpointing=train.activation_checkpointing,
        averaged=train.ema_decay > 0,
        compiled=train.compile,
        isolated=recipe.data.packing,
        adapter=recipe.model.adapter,
        whole=_not_spread(recipe),
        bf16_reduce=recipe.parallel.reduce == "bf16",
        background_checkpoints=device == "cpu" and recipe.checkpoint.every > 0 and recipe.checkpoint.async_,
    )


def _not_spread(recipe: Recipe) -> frozenset[str]:
    """The dimensions of ``parallel`` that hearth.training.objectives refuse."""
    train = recipe.train
    if train.objective in ("grpo", "ppo", "reward"):
        return frozenset({"context", "pipeline"})
    if train.objective in _PAIRS:
        return frozenset({"context"} | ({"pipeline"} if train.preference.reference == "model" else set()))
    if train.objective == "distill" and train.distill.mode != "sequence":
        return frozenset({"context"})
    return frozenset()


def what_is_missing(recipe: Recipe) -> str | None:
    """What of an objective the figures leave out, in words; None for objectives that are counted in full."""
    objective = recipe.train.objective
    if objective in _PLAIN:
        return None
    if objective in ("grpo", "ppo"):
        return f"{objective}: rollouts, their engine and its cache, and a value head are not counted"
    if objective == "distill":
        return "distill: the teacher's weights and passes are not counted"
    return f"{objective}: the pass of the reference before the first step is not counted"


def check_job(job: Job) -> None:
    """Raise ConfigError for numbers that no run can have."""
    for name in ("sequence_length", "batch_size", "micro_batch_size"):
        if getattr(job, name) < 1:
            raise ConfigError(f"{name} {getattr(job, name)} is not positive")
    if job.batch_size % job.micro_batch_size:
        raise ConfigError(
            f"batch_size {job.batch_size} is not a multiple of micro_batch_size {job.micro_batch_size}"
        )
