"""Whether every parameter and buffer of a model has a place after it was spread, and the right one.

A weight that no process has, or whose gradients nobody adds up, would train to something, silently. So the
names that the whole model had are looked for in all processes, once, before the first step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from hearth.errors import ConfigError
from hearth.parallel.shards import MADE_OF, in_pieces
from hearth.parallel.world import World

_FIX = "use another layout: parallel.shard spreads the models of every family"
_SHOWN = 3


@dataclass(frozen=True)
class Item:
    """One parameter or buffer of the whole model."""

    kind: str
    shape: tuple[int, ...]


def inventory(model: nn.Module) -> dict[str, Item]:
    """All that a model has, by name; tied weights once."""
    found = {name: Item("parameter", tuple(weight.shape)) for name, weight in model.named_parameters()}
    return found | {name: Item("buffer", tuple(value.shape)) for name, value in model.named_buffers()}


def placements(model: nn.Module) -> dict[str, str]:
    """How each parameter and buffer is placed in this process, in words; what is elsewhere is absent.

    ``replicated``: all of it is here. ``Shard(dim=0) over shard``: this process has its part.
    """
    return {name: _placement(tensor) for name, tensor in _tensors(model)}


def require_complete(
    before: Mapping[str, Item], model: nn.Module, runs: Sequence[nn.Module], world: World
) -> None:
    """Raise ConfigError, in every process, for a model that was not spread as it must be.

    ``before``: the `inventory` of the whole model. ``runs``: what computes with it, which may have no weights
    of its own. Refused are: a name that is in no process, a parameter that is in two stages of a pipeline,
    one whose parts do not make up its shape, one whose gradients are not added up over the processes that
    train on other rows or positions, and processes of one stage that do not agree.
    """
    if world.size == 1:
        return
    own = placements(model)
    problems = [*_strange(before, model), *_unsummed(model, runs, world), *_unknown_to(model, runs)]
    stage = world.layout.coordinates(world.rank)["pipeline"]
    everywhere = world.gather((stage, _digest(own), problems[:_SHOWN]))
    for rank, (_, _, others) in enumerate(everywhere):
        if others:
            raise _incomplete("; ".join(others), rank)
    if any(len({digest for at, digest, _ in everywhere if at == each}) > 1 for each, _, _ in everywhere):
        raise _incomplete(_disagreement(world.gather((stage, own))))
    if missing := _miscounted(before, own, world):
        raise _incomplete("; ".join(missing[:_SHOWN]))


def _incomplete(what: str, rank: int | None = None) -> ConfigError:
    where = "" if rank is None else f" (rank {rank})"
    return ConfigError(f"parallel: the model was not spread completely{where}: {what}", fix=_FIX)


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _placement(tensor: Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return "replicated"
    names = tensor.device_mesh.mesh_dim_names or ["?"] * len(tensor.placements)
    pairs = zip(names, tensor.placements, strict=True)
    # Where there is nothing to cut, as over one process, it is whole.
    cut = [f"{placement} over {name}" for name, placement in pairs if not placement.is_replicate()]
    return ", ".join(cut) or "replicated"


def _digest(own: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _strange(before: Mapping[str, Item], model: nn.Module) -> Iterable[str]:
    """Names that the model did not have, and tensors whose parts are not parts of what it had."""
    for name, tensor in _tensors(model):
        if name not in before:
            yield f"{name} was not in the whole model"
            continue
        shape, local = tuple(tensor.shape), tensor
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            if not in_pieces(tensor):
                due = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)[0]
                if tuple(local.shape) != tuple(due):
                    yield f"{name} has {tuple(local.shape)} here, its placement says {tuple(due)}"
        if shape != before[name].shape:
            yield f"{name} has shape {shape}, in the whole model {before[name].shape}"


def _unsummed(model: nn.Module, runs: Sequence[nn.Module], world: World) -> Iterable[str]:
    """Weights whose gradients stay apart in processes that train on other rows or positions."""
    needed = {name for name in ("data", "shard", "context") if getattr(world.layout, name) > 1}
    replicas = [run for run in runs if isinstance(run, DistributedDataParallel)]
    # Those that it was made for; what has come into its module since, nobody adds up.
    together = {id(weight) for run in replicas for weight in run._module_parameters}
    for name, weight in model.named_parameters():
        if not weight.requires_grad or id(weight) in together:
            continue
        dimensions: tuple[str, ...] = ()
        if isinstance(weight, DTensor):
            dimensions = weight.device_mesh.mesh_dim_names or ()
        covered = {own for dimension in dimensions for own in MADE_OF.get(dimension, (dimension,))}
        if left := sorted(needed - covered):
            yield f"the gradients of {name} are not added up over {', '.join(left)}"


def _unknown_to(model: nn.Module, runs: Sequence[nn.Module]) -> Iterable[str]:
    """Weights that something computes with, but which are none of the model's: no optimizer has them."""
    own = {id(weight) for weight in model.parameters()}
    for run in runs:
        for name, weight in run.named_parameters():
            if weight.requires_grad and id(weight) not in own:
                yield f"{name} is a copy that does not train"


def _disagreement(everywhere: Sequence[tuple[int, Mapping[str, str]]]) -> str:
    first: dict[int, tuple[int, Mapping[str, str]]] = {}
    for rank, (stage, own) in enumerate(everywhere):
        other, expected = first.setdefault(stage, (rank, own))
        for name in sorted(own.keys() | expected.keys()):
            if own.get(name) != expected.get(name):
                there, here = expected.get(name, "absent"), own.get(name, "absent")
                return f"{name} is {there} in rank {other}, {here} in rank {rank}"
    raise AssertionError("their digests differ")


def _miscounted(before: Mapping[str, Item], own: Mapping[str, str], world: World) -> list[str]:
    """Names that no stage has, and parameters that several have."""
    names = sorted(before)
    counts = torch.tensor([int(name in own) for name in names], device=world.device)
    dist.all_reduce(counts)
    each = world.size // world.layout.pipeline
    problems = []
    for name, count in zip(names, counts.tolist(), strict=True):
        item: Any = before[name]
        if count == 0:
            problems.append(f"the {item.kind} {name} is in no process")
        elif item.kind == "parameter" and count != each:
            problems.append(f"the parameter {name} is in {count // each} stages of the pipeline")
    return problems
