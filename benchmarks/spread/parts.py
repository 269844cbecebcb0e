"""What is measured, by part; each runs in all processes at once and returns what this one found."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from spread.checkpoints import checkpoints
from spread.jobs import CPU, Plain, Shape, as_if_alone, group, new_model, new_rows, new_trainer, recipe_of
from spread.one_gpu import one_gpu
from spread.tables import ALONE, ALONE_PLAIN, LAYOUTS, PLAIN
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from hearth.config.parallel import ParallelSection
from hearth.parallel.apply import parallelize
from hearth.parallel.pipeline import Inputs
from hearth.parallel.world import World
from hearth.training.batches import collate
from hearth.training.precision import autocast, choose_precision


def scaling(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the steps of every competitor but the first, which warms up; in turns, and losses."""
    shape = Shape(**job["shape"])
    model, rows = new_model(shape.size), new_rows(shape.length)
    seconds: dict[str, list[list[float]]] = {name: [] for name in job["names"]}
    losses: dict[str, list[float]] = {}
    for round_ in range(job["rounds"]):
        for name in job["names"] if round_ % 2 == 0 else reversed(job["names"]):
            with group(LAYOUTS.get(name, {"data": 2})) as world:
                alone = name in (ALONE, ALONE_PLAIN)
                if not alone or world.is_main:
                    here = World.alone(CPU) if alone else world
                    with as_if_alone() if alone else contextlib.nullcontext():
                        found = _steps(name, model, rows, shape, here, job)
                    seconds[name].append([each for each, _ in found][1:])
                    losses[name] = [loss for _, loss in found]
                world.from_main(None)  # who has nothing to do waits
    parameters = sum(weight.numel() for weight in model.parameters())
    return {"seconds": seconds, "losses": losses, "parameters": parameters}


def _steps(
    name: str, model: nn.Module, rows: Any, shape: Shape, world: World, job: dict[str, Any]
) -> list[tuple[float, float]]:
    """Seconds and loss of each step."""
    recipe = recipe_of(shape, LAYOUTS.get(name, {"data": world.size}), job["precision"])
    trainer = None if name in (PLAIN, ALONE_PLAIN) else new_trainer(model, rows, recipe, world)
    plain = Plain(copy.deepcopy(model), recipe, world) if trainer is None else None
    found = []
    for step in range(job["steps"] + 1):
        if world.size > 1:
            dist.barrier()
        started = time.perf_counter()
        if trainer is not None:
            loss = trainer.train_step(step).loss
        else:
            assert plain is not None
            loss = plain.step(rows, step)
        found.append((time.perf_counter() - started, loss))
    return found


def overhead(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the same step by our trainer and by two loops in plain torch DDP, all in one process.

    ``bare``: plain torch DDP around our loss. Who goes first changes from step to step.
    """
    shape = Shape(**job["shape"])
    model, rows = new_model(shape.size), new_rows(shape.length)
    with group({"data": 2}) as world:
        recipe = recipe_of(shape, {"data": 2}, job["precision"])
        trainer = new_trainer(model, rows, recipe, world)
        plain = Plain(copy.deepcopy(model), recipe, world)
        bare = Plain(copy.deepcopy(model), recipe, world, loss="hearth")
        steps: dict[str, Callable[[int], object]] = {
            "hearth": trainer.train_step,
            "plain": lambda step: plain.step(rows, step),
            "bare": lambda step: bare.step(rows, step),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        names = list(steps)
        for step in range(job["steps"] + 2):
            for name in names:
                dist.barrier()
                started = time.perf_counter()
                steps[name](step)
                dist.barrier()  # the slower process counts
                if step > 1:  # DDP arranges its buckets anew after the first
                    seconds[name].append(time.perf_counter() - started)
            names = [*names[1:], names[0]]
    return {"seconds": seconds}


class _Busy:
    """Seconds within the passes of stages, told from waiting for what others send."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
            self._time(name)

    def _time(self, name: str) -> None:
        original = getattr(PipelineStage, name)

        def timed(*arguments: Any, **settings: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*arguments, **settings)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(PipelineStage, name, timed)


def bubble(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a pipeline's passes, and how many of them this process computed; by schedule and number.

    The clock runs from when both processes are ready until both are done.
    """
    shape, device = Shape(**job["shape"]), CPU
    model, rows = new_model(shape.size), new_rows(shape.length)
    precision = choose_precision(job["precision"], device)
    busy, found = _Busy(), []
    for schedule in job["schedules"]:
        parallel = LAYOUTS[schedule]
        with group(parallel) as world:
            section = ParallelSection.model_validate(parallel)
            own = copy.deepcopy(model)
            pipeline = parallelize(own, world, section, sequence_length=shape.length).pipeline
            assert pipeline is not None
            for num in job["numbers"]:
                batches = [
                    collate(rows, range(at * shape.micro, (at + 1) * shape.micro)) for at in range(num)
                ]
                inputs = [Inputs(batch.input_ids_BT, batch.position_ids_BT) for batch in batches]

                def loss(model: nn.Module, number: int, batches: Any = batches) -> Tensor:
                    batch = batches[number]
                    with autocast(precision, device):
                        logits = model(
                            input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
                        ).logits
                    return F.cross_entropy(logits.float().flatten(0, 1), batch.labels_BT.flatten())

                for round_ in range(job["rounds"] + 1):
                    dist.barrier()
                    busy.seconds, started = 0.0, time.perf_counter()
                    with autocast(precision, device):
                        pipeline.run(inputs, loss, hidden_size=model.config.hidden_size, dtype=torch.float32)
                    dist.barrier()
                    wall = time.perf_counter() - started
                    own.zero_grad(set_to_none=True)
                    if round_ > 0:
                        facts = {"schedule": schedule, "num": num, "wall": wall, "busy": busy.seconds}
                        found.append(facts)
    return {"passes": found}


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "scaling": scaling,
    "overhead": overhead,
    "bubble": bubble,
    "checkpoint": checkpoints,
    "gpu": one_gpu,
}
