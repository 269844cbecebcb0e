"""Pipeline parallelism: every process has some of the layers, micro-batches pass from one to the next.

A stage is the model itself with the layers of other stages left out, so that masks, positions and everything
around the layers stay as the family has them. The last stage computes the loss as one process would: it sees
a model whose decoder begins with what has arrived. Schedules are torch's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.parallel.world import World

# ``loss(model, number of the micro-batch)``: this micro-batch's part of the loss of the step, a scalar.
LossOf = Callable[[nn.Module, int], Tensor]


@dataclass(frozen=True)
class Inputs:
    """What the decoder takes of a micro-batch: B rows of T positions."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor


def divide_layers(num_layers: int, num_stages: int) -> list[range]:
    """Which layers each stage has; where they do not divide, later stages but the last have one more.

    The last one has the output layer besides, so that it is the first to be spared.
    """
    each, rest = divmod(num_layers, num_stages)
    extra = set(range(num_stages - 1 - rest, num_stages - 1))
    sizes = [each + (index in extra) for index in range(num_stages)]
    return [range(sum(sizes[:index]), sum(sizes[: index + 1])) for index in range(num_stages)]


def own_stages(section: ParallelSection, rank: int) -> list[int]:
    """The stages of a pipeline process: in turns, which is what interleaving is."""
    return [rank + turn * section.pipeline for turn in range(section.stages)]


class Absent(nn.Module):
    """Stands where a part is that another stage has; hands on what it gets."""

    def __init__(self, present: nn.Module) -> None:
        super().__init__()
        # What a decoder asks its layers before it calls them, such as which mask they want.
        for name, value in vars(present).items():
            if isinstance(value, str | int | bool) and name != "training":
                setattr(self, name, value)

    def forward(self, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """The input."""
        return hidden


class Stage(nn.Module):
    """Some layers of a model, as torch's schedules call them: with a tensor and the micro-batch's number."""

    def __init__(self, model: nn.Module, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.model = _without_others(model, layers, first=first, last=last)
        self.inputs: Sequence[Inputs] = ()
        self.loss: LossOf | None = None
        self._arrived: Tensor | None = None
        decoder: Any = self.model.base_model
        self._decode = decoder.forward
        if last and not first:
            decoder.forward = self._go_on

    def _go_on(self, **kwargs: Any) -> Any:
        return self._decode(**{**kwargs, "input_ids": None, "inputs_embeds": self._arrived})

    def forward(self, arrived: Tensor, number: Tensor) -> Tensor:
        """Hidden states of micro-batch ``number``, or its part of the loss. The first stage reads its ids."""
        index = int(number)
        if self.last:
            assert self.loss is not None
            self._arrived = arrived
            return self.loss(self.model, index).reshape(1)
        given = self.inputs[index]
        start = {"input_ids": given.input_ids_BT} if self.first else {"inputs_embeds": arrived}
        hidden: Tensor = self._decode(
            **start, position_ids=given.position_ids_BT, use_cache=False
        ).last_hidden_state
        return hidden


def _parts(model: Any) -> tuple[list[str], nn.ModuleList, list[str]]:
    """Names of what comes before the layers, the layers, names of what comes after, by the model's plan."""
    kind = type(model).__name__
    plan = getattr(model.config.get_text_config(), "base_model_pp_plan", None)
    layers = getattr(model.base_model, "layers", None)
    if not plan or "layers" not in plan or not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"parallel.pipeline: {kind} has no plan for a pipeline", fix="use parallel.shard for this family"
        )
    names = list(plan)
    at = names.index("layers")
    return names[:at], layers, names[at + 1 :]


def require_stages(model: nn.Module, section: ParallelSection) -> None:
    """Raise ConfigError for a model that cannot be cut into these stages."""
    _, layers, _ = _parts(model)
    num_stages = section.pipeline * section.stages
    if hasattr(model, "peft_config"):
        raise ConfigError("parallel.pipeline does not take adapters", fix="use parallel.shard")
    if len(layers) < num_stages:
        raise ConfigError(
            f"parallel: {num_stages} stages (pipeline {section.pipeline} x stages {section.stages}) are more "
            f"than the {len(layers)} layers of the model",
            fix=f"use at most {len(layers)} stages",
        )
    tied = getattr(model, "get_output_embeddings", lambda: None)()
    source = getattr(model, "get_input_embeddings", lambda: None)()
    if tied is not None and source is not None and tied.weight is source.weight:
        raise ConfigError(
            "parallel.pipeline: the model's output layer is its embedding, which are in different stages",
            fix="use a model with tie_word_embeddings: false, or parallel.shard",
        )


def _without_others(model: nn.Module, own: range, *, first: bool, last: bool) -> Any:
    """The model without what other stages have. Parts are the model's own; only what holds them is copied."""
    before, layers, after = _parts(model)
    base: Any = model.base_model
    shared = [*layers, *(getattr(base, name) for name in (*before, *after))]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        shared.append(head)
    found: Any = copy.deepcopy(model, {id(part): part for part in shared})
    decoder = found.base_model
    for index, layer in enumerate(layers):
        if index not in own:
            decoder.layers[index] = Absent(layer)
    for name in before if not first else ():
        setattr(decoder, name, Absent(getattr(base, name)))
    for name in after if not last else ():
        setattr(decoder, name, Absent(getattr(base, name)))
    if head is not None and not last:
        found.set_output_embeddings(Absent(head))
    return found


def keep_only(model: nn.Module, stages: Sequence[Stage]) -> None:
    """Take out of the whole model what no stage of this process has; names of the rest stay."""
    before, layers, after = _parts(model)
    base: Any = model.base_model
    kept = {id(module) for stage in stages for module in stage.modules()}
    for index, layer in enumerate(layers):
        if id(layer) not in kept:
            layers[index] = Absent(layer)
    for name in (*before, *after):
        if id(getattr(base, name)) not in kept:
            setattr(base, name, Absent(getattr(base, name)))
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and id(head) not in kept:
        model.set_output_embeddings(Absent(head))  # type: ignore[operator]


def make_stages(model: nn.Module, world: World, section: ParallelSection) -> list[Stage]:
    """The stages of this process. Afterwards the model holds their weights alone, under its own names."""
    require_stages(model, section)
    num_stages = section.pipeline * section.stages
    _, layers, _ = _parts(model)
    ranges = divide_layers(len(layers), num_stages)
    stages = [
        Stage(model, ranges[index], first=index == 0, last=index == num_stages - 1)
        for index in own_stages(section, world.layout.coordinates(world.rank)["pipeline"])
    ]
    keep_only(model, stages)
    return stages


class Pipeline:
    """Runs the micro-batches of a step through the stages of all processes."""

    def __init__(self, stages: Sequence[Stage], world: World, section: ParallelSection) -> None:
        self.stages, self._world, self._section = stages, world, section
        self._schedules: dict[tuple[Any, ...], Any] = {}

    def run(self, inputs: Sequence[Inputs], loss: LossOf, *, hidden_size: int, dtype: torch.dtype) -> bool:
        """Forward and backward, or forward alone without gradients. True where the loss was computed."""
        for stage in self.stages:
            stage.inputs, stage.loss = inputs, loss
        schedule = self._schedule(len(inputs), tuple(inputs[0].input_ids_BT.shape), hidden_size, dtype)
        numbers = torch.arange(len(inputs))
        # The first stage takes no tensor of another; torch wants one to cut into micro-batches.
        given = (numbers,) if any(stage.first for stage in self.stages) else ()
        target = numbers if any(stage.last for stage in self.stages) else None
        run = schedule.step if torch.is_grad_enabled() else schedule.eval
        run(*given, number=numbers, target=target, losses=[] if target is not None else None)
        return target is not None

    def _schedule(self, num: int, shape: tuple[int, ...], hidden_size: int, dtype: torch.dtype) -> Any:
        key = (num, shape, hidden_size, dtype, torch.is_grad_enabled())
        if key not in self._schedules:
            self._schedules[key] = self._make_schedule(num, shape, hidden_size, dtype)
        return self._schedules[key]

    def _make_schedule(self, num: int, shape: tuple[int, ...], hidden_size: int, dtype: torch.dtype) -> Any:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import (
            Schedule1F1B,
            ScheduleInterleaved1F1B,
            ScheduleInterleavedZeroBubble,
        )

        world, section = self._world, self._section
        assert world.mesh is not None
        rank = world.layout.coordinates(world.rank)["pipeline"]
        number = torch.zeros(1, dtype=torch.int64, device="meta")
        hidden = torch.empty(*shape, hidden_size, dtype=dtype, device="meta", requires_grad=True)
        value = torch.zeros(1, dtype=dtype, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                stage,
                index,
                section.pipeline * section.stages,
                world.device,
                input_args=(number if stage.first else hidden,),
                output_args=(value if stage.last else hidden,),
                group=world.mesh.get_group("pipeline"),
            )
            for index, stage in zip(own_stages(section, rank), self.stages, strict=True)
        ]
        settings: dict[str, Any] = {"loss_fn": _first_argument, "scale_grads": False}
        if section.schedule == "1f1b":
            return Schedule1F1B(stages[0], num, **settings)
        kind = ScheduleInterleaved1F1B if section.schedule == "interleaved" else ScheduleInterleavedZeroBubble
        return kind(list(stages), num, **settings)

    def from_last(self, value: Any) -> Any:
        """What the process of the last stage has, in all processes of this pipeline; any picklable value."""
        assert self._world.mesh is not None
        group = self._world.mesh.get_group("pipeline")
        last = (self._section.pipeline * self._section.stages - 1) % self._section.pipeline
        box = [value]
        dist.broadcast_object_list(box, group_src=last, group=group, device=self._world.device)
        return box[0]


def _first_argument(output: Tensor, _target: Tensor) -> Tensor:
    return output.sum()


@functools.cache
def bubble(schedule: str, *, pipeline: int, stages: int, num_micro_batches: int) -> float:
    """The share of a step in which a process of the pipeline has nothing to do, were all passes equal.

    1F1B (Narayanan et al. 2021, section 2.2): (p - 1) / (m + p - 1); interleaved with v stages a process:
    (p - 1) / (v m + p - 1); zero bubble (Qi et al. 2023, section 2): weights' gradients fill a third of it.
    """
    idle = (pipeline - 1) / (stages if schedule != "1f1b" else 1)
    if schedule == "zero_bubble":
        idle /= 3
    return idle / (num_micro_batches + idle)
