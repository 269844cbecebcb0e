"""Weights, gradients and optimizer state of one process.

ZeRO (Rajbhandari et al. 2020, section 5): with n processes stage 1 divides optimizer state by n, stage 2
gradients too, stage 3 weights too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from hearth.parallel.planner.facts import ModelFacts, Weight
from hearth.parallel.planner.job import Job

# As in hearth.training.optimizers.adamw8bit: smaller weights keep exact moments, larger ones a scale a block.
_SMALLEST_8BIT, _BLOCK_8BIT = 4096, 256
# Bytes a value of a frozen base (hearth.models.quantised): codes, and a scale for each block of 64.
_FROZEN = {"none": 4.0, "int8": 1.0 + 4 / 64, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
# Parts that quantisation reaches: linear layers inside of the decoder layers.
_QUANTISED = ("attention", "dense")


def optimizer_bytes(weight: Weight, job: Job) -> int:
    """State of one weight once it has had a gradient; the figures of hearth.training.optimizers.size."""
    n, step = weight.size, 4
    match job.optimizer:
        case "adamw8bit":
            if n < _SMALLEST_8BIT:
                return step + 8 * n
            return step + 2 * n + 8 * math.ceil(n / _BLOCK_8BIT)
        case "lion":
            return 4 * n
        case "muon" if weight.hidden:
            return 4 * n
        case "adafactor":
            if len(weight.shape) < 2:
                return step + 4 * n
            return step + 4 * (n // weight.shape[-1] + n // weight.shape[-2])
    return step + 8 * n


def adapter_weights(weight: Weight, job: Job) -> list[Weight]:
    """The trainable weights that an adapter puts beside a matrix: A of rank rows, B of rank columns."""
    if job.adapter is None or weight.part not in _QUANTISED or len(weight.shape) != 2:
        return []
    rows, columns = weight.shape
    rank = job.adapter.rank
    found = [
        Weight(weight.part, weight.layer, (rank, columns)),
        Weight(weight.part, weight.layer, (rows, rank)),
    ]
    return [*found, Weight("norm", weight.layer, (rows,))] if job.adapter.dora else found


@dataclass
class State:
    """Bytes that a process keeps from step to step, before anything is divided among processes by ZeRO."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    average: float = 0.0
    values: float = 0.0  # number of weights
    trainable: float = 0.0
    matrices: float = 0.0  # weights of linear layers, of which autocast makes copies
    largest: float = 0.0  # the largest single weight, in values

    def add(self, weight: Weight, job: Job, divisor: float) -> None:
        """Take in one weight of which this process has one part in ``divisor``."""
        own = weight.size / divisor
        trained = adapter_weights(weight, job) if job.adapter is not None else [weight]
        frozen = job.adapter is not None
        quantised = frozen and weight.part in _QUANTISED and len(weight.shape) == 2
        kind = job.adapter.quantize if quantised and job.adapter is not None else "none"
        self.weights += own * (_FROZEN[kind] if frozen else 2.0 if job.bf16_state else 4.0)
        self.values += own
        # Grouped products of experts take their weights as they are.
        if weight.part in ("attention", "dense") and kind == "none":
            self.matrices += own
        for each in trained:
            size = each.size / divisor
            if frozen:
                self.weights += 4 * size
                self.values += size
            self.trainable += size
            self.gradients += 4 * size
            self.optimizer += optimizer_bytes(each, job) / divisor + (4 * size if job.bf16_state else 0)
            self.average += 4 * size if job.averaged else 0
            self.largest = max(self.largest, size)

    def scaled(self, factor: float) -> State:
        """The same, every figure times a factor."""
        return State(**{name: value * factor for name, value in vars(self).items()})

    def __add__(self, other: State) -> State:
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return State(**{**sums, "largest": max(self.largest, other.largest)})


@dataclass(frozen=True)
class Placed:
    """What a process of a pipeline stage holds: its dense state and that of its experts, apart."""

    dense: State
    experts: State
    ends: State  # embedding, output layer, last norm: gathered in one piece
    largest_layer: State  # dense and experts, of the largest layer
    mixed: State  # dense and experts of all layers that have experts
    largest_is_mixed: bool

    @functools.cached_property
    def whole(self) -> State:
        """All of it."""
        return self.dense + self.experts + self.ends


def place(
    facts: ModelFacts,
    job: Job,
    layers: Iterable[int],
    *,
    first: bool,
    last: bool,
    tensor: int,
    expert: int,
) -> Placed:
    """The state of a stage with these layers. ``first``, ``last``: whether embedding and head belong to it.

    Norms are whole in every tensor process, and embedding and head without ``vocabulary_split``.
    """
    # What a step is cut into changes nothing here, and many cuts are asked for.
    return _place(facts, job.one_row, tuple(layers), first, last, tensor, expert)


@functools.lru_cache(maxsize=4096)
def _place(
    facts: ModelFacts,
    job: Job,
    layers: tuple[int, ...],
    first: bool,
    last: bool,
    tensor: int,
    expert: int,
) -> Placed:
    wanted = frozenset(layers)
    dense, experts, ends = State(), State(), State()
    by_layer: dict[int, State] = {}
    for weight in facts.weights:
        if weight.layer is None:
            words = tensor if job.vocabulary_split and len(weight.shape) == 2 else 1
            mine = first if weight.part == "embedding" else last
            if mine or (weight.part == "embedding" and last and facts.tied):
                ends.add(weight, job, words)
            continue
        if weight.layer not in wanted:
            continue
        is_expert = weight.part == "experts"
        divisor = (1 if weight.part == "norm" else tensor) * (expert if is_expert else 1)
        (experts if is_expert else dense).add(weight, job, divisor)
        by_layer.setdefault(weight.layer, State()).add(weight, job, divisor)
    largest = max(by_layer, key=lambda layer: by_layer[layer].values, default=-1)
    having = {weight.layer for weight in facts.weights if weight.part == "experts"}
    mixed = sum((state for layer, state in by_layer.items() if layer in having), State())
    return Placed(dense, experts, ends, by_layer.get(largest, State()), mixed, largest in having)
