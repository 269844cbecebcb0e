"""Spreads a model over the processes of a world, as the section ``parallel`` of a recipe says."""

from __future__ import annotations

from torch import nn

from hearth.config.parallel import ParallelSection
from hearth.parallel.sharding import LossModule, replicate, shard_weights
from hearth.parallel.tensor import apply_tensor_parallel
from hearth.parallel.world import World


def parallelize(model: nn.Module, world: World, section: ParallelSection) -> nn.Module:
    """The module to call instead of ``model``: ``module(function, *inputs)`` is ``function(model, *inputs)``.

    The model stays what it is, with the names of its weights, which may become DTensors. Build the optimizer
    afterwards.
    """
    if world.layout.tensor > 1:
        apply_tensor_parallel(model, world)
    module = LossModule(model)
    layout = world.layout
    # DDP takes no weights that are cut; a mesh of which one dimension is 1 is how FSDP2 replicates.
    if layout.shard > 1 or section.offload == "cpu" or (layout.data > 1 and layout.tensor > 1):
        shard_weights(module, world, section)
    elif layout.data > 1:
        return replicate(module, world, section)
    return module
