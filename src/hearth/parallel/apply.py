"""Spreads a model over the processes of a world, as the section ``parallel`` of a recipe says."""

from __future__ import annotations

from torch import nn

from hearth.config.parallel import ParallelSection
from hearth.parallel.sharding import LossModule, replicate, shard_weights
from hearth.parallel.world import World


def parallelize(model: nn.Module, world: World, section: ParallelSection) -> nn.Module:
    """The module to call instead of ``model``: ``module(function, *inputs)`` is ``function(model, *inputs)``.

    The model stays what it is, with the names of its weights, which may become DTensors. Build the optimizer
    afterwards.
    """
    module = LossModule(model)
    if world.layout.shard > 1 or section.offload == "cpu":
        shard_weights(module, world, section)
    elif world.layout.data > 1:
        return replicate(module, world, section)
    return module
