"""Spreads a model over the processes of a world, as the section ``parallel`` of a recipe says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hearth.config.parallel import ParallelSection
from hearth.models.in_parts import Source
from hearth.parallel.context import ContextParallel
from hearth.parallel.deepspeed import DeepSpeedModule
from hearth.parallel.filling import fill
from hearth.parallel.pipeline import Pipeline, make_stages
from hearth.parallel.sharding import LossModule, replicate, shard_weights
from hearth.parallel.tensor import apply_tensor_parallel
from hearth.parallel.world import World


@dataclass(frozen=True)
class Parallelized:
    """What to call instead of the model.

    ``module(function, *inputs)`` is ``function(model, *inputs)``; None in a pipeline, where no process has
    the model, and ``pipeline`` runs the micro-batches of a step.
    """

    module: nn.Module | None
    pipeline: Pipeline | None = None
    context: ContextParallel | None = None

    @property
    def runs(self) -> list[nn.Module]:
        """What computes: the module, or the stages of this process."""
        stages: list[nn.Module] = [] if self.pipeline is None else [*self.pipeline.stages]
        return stages if self.module is None else [self.module]


def parallelize(
    model: nn.Module,
    world: World,
    section: ParallelSection,
    *,
    sequence_length: int,
    source: Source | None = None,
    compute: torch.dtype | None = None,
) -> Parallelized:
    """Spread ``model``. It stays what it is, with the names of its weights, which may become DTensors.

    Build the optimizer afterwards. ``source``: of a model on the meta device, where its weights come from;
    each process takes its part of them. ``compute``: the type of autocast, in which weights of layers then
    travel to where they are used. Raises ConfigError for what cannot be combined or does not divide.
    """
    if section.engine == "deepspeed":
        return Parallelized(DeepSpeedModule(model, world, section, source))
    spread = _spread(model, world, section, sequence_length, compute)
    if source is not None:
        stages = [] if spread.pipeline is None else spread.pipeline.stages
        device = torch.device("cpu") if section.offload == "cpu" else world.device
        fill([model, *(stage.model for stage in stages)], source, device=device)
        for root in stages if spread.module is None else (spread.module,):
            # FSDP2 looks at its weights again.
            root._apply(lambda tensor: tensor)  # type: ignore[no-untyped-call]
    return spread


def _spread(
    model: nn.Module,
    world: World,
    section: ParallelSection,
    sequence_length: int,
    compute: torch.dtype | None,
) -> Parallelized:
    layout = world.layout
    context = ContextParallel(model, world, sequence_length) if layout.context > 1 else None
    if layout.tensor > 1:
        apply_tensor_parallel(model, world, section)
    # DDP takes neither weights that are cut nor stages; a mesh of which one dimension is 1 is how FSDP2
    # replicates.
    sharded = layout.shard > 1 or section.offload == "cpu"
    replicas = layout.data * layout.context
    sharded = sharded or (replicas > 1 and max(layout.tensor, layout.pipeline, layout.expert) > 1)
    if layout.pipeline > 1:
        stages = make_stages(model, world, section)
        for stage in stages if sharded else ():
            shard_weights(stage, world, section, compute)
        return Parallelized(None, Pipeline(stages, world, section), context)
    module = LossModule(model)
    if sharded:
        shard_weights(module, world, section, compute)
    elif layout.data * layout.context > 1:
        return Parallelized(replicate(module, world, section), context=context)
    return Parallelized(module, context=context)
