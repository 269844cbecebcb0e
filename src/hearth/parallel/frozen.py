"""Models that do not train, beside one that is spread over processes, such as what it is compared with."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from hearth.config.parallel import ParallelSection
from hearth.parallel.sharding import LossModule, shard_weights
from hearth.parallel.tensor import apply_tensor_parallel
from hearth.parallel.world import World


def is_spread(model: nn.Module) -> bool:
    """Whether a process has parts of some weights alone."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def spread_frozen(model: nn.Module, world: World, section: ParallelSection) -> LossModule:
    """Freeze ``model``, which every process has whole, and spread it as the one that trains is.

    Without gradients ``found(function, *inputs)`` is ``function(model, *inputs)``; processes that share the
    model must all call it equally often.
    """
    module = LossModule(model)
    module.requires_grad_(False).eval()
    if world.layout.tensor > 1:
        apply_tensor_parallel(model, world, section)
    if world.layout.shard > 1 or world.layout.expert > 1:
        shard_weights(module, world, section)
    return module
