"""Weights, gradients and optimizer state shared over processes: ZeRO by torch's FSDP2, and plain replicas.

Everything goes through one module whose forward pass is, for example, the loss of a micro-batch, so that the
hooks of both see whatever an objective calls: the decoder and the output layer apart, a model twice.

Gradients are added up over processes, not averaged: the loss was divided by the counts of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.parallel.expert import apply_expert_parallel
from hearth.parallel.world import World


class LossModule(nn.Module):
    """A model under whatever is computed with it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.is_last = True  # whether the micro-batch is the last of its step

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(model, *inputs)``; what has a gradient of it is in tensors, dicts or tuples."""
        return function(self.model, *inputs)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def shard_weights(
    module: nn.Module, world: World, section: ParallelSection, compute: torch.dtype | None = None
) -> None:
    """ZeRO over the processes of ``shard``, replicated over those of ``data``.

    Stage 3 gathers the weights of a layer when it runs (Rajbhandari et al. 2020, "ZeRO", section 5); 2 keeps
    them until the step ends; 1 adds up the gradients of all micro-batches before it shares them, with
    ``reduce: bf16`` in bfloat16, as FSDP2 does. The module's weights become DTensors. Raises ConfigError for
    a model without layers.
    """
    assert world.mesh is not None
    layers = decoder_layers(module)
    if not layers:
        raise ConfigError(
            f"parallel.shard {section.shard}: this model has no decoder layers to share",
            fix="use a model of transformers, or shard: 1",
        )
    # What autocast would make of a layer's weights is what is sent; gradients are added up in full.
    wire = torch.bfloat16 if section.reduce == "bf16" else None if compute is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=wire, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(reduce_dtype=wire)
    settings: dict[str, Any] = {
        "mesh": world.sharding_mesh(),
        "reshard_after_forward": section.zero == 3,
        "mp_policy": exact,
        "offload_policy": _offload(section, world),
    }
    for experts in apply_expert_parallel(module, world) if world.layout.expert > 1 else ():
        assert world.expert_mesh is not None
        # Those of other groups have the same experts; within the group everyone has his own.
        fully_shard(experts, **{**settings, "mesh": world.expert_mesh["replica"]})
    for layer in layers:
        # Autocast knows nothing of the products of experts.
        fully_shard(layer, **{**settings, "mp_policy": exact if _has_experts(layer) else policy})
    fully_shard(module, **{**settings, "reshard_after_forward": False})
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    module.register_forward_hook(_shared_again)


def _shared_again(module: nn.Module, _inputs: Any, _output: Any) -> None:
    """After a pass without gradients: no backward pass follows after which FSDP would do it.

    Else who looks at the weights next, such as a checkpoint that is loaded, finds whole ones, and changes to
    those are lost.
    """
    if not torch.is_grad_enabled():
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def _offload(section: ParallelSection, world: World) -> OffloadPolicy:
    if section.offload != "cpu":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=world.device.type == "cuda")


def replicate(module: LossModule, world: World, section: ParallelSection) -> nn.Module:
    """Replicas whose gradients are added up while the backward pass goes on (torch's DDP)."""
    assert world.mesh is not None
    group = world.replica_group()
    # Buffers are the same everywhere and stay so; DDP would send them before every forward pass.
    buffers = [name for name, _ in module.named_buffers()]
    wrapper: Any = DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(module, buffers)
    wrapped = DistributedDataParallel(
        module,
        process_group=group,
        # A layer of experts may get no token of a micro-batch.
        find_unused_parameters=_has_experts(module),
        gradient_as_bucket_view=True,
    )
    _reduce_by(wrapped, section, group)
    return wrapped


def _reduce_by(wrapped: DistributedDataParallel, section: ParallelSection, group: Any) -> None:
    """How gradients cross the wire.

    PowerSGD (Vogels et al. 2019, algorithm 2): factors of rank 4 of each matrix, where they are less than
    half as large; what they miss is added to the next step's gradients. Two steps are sent whole first. What
    is missed and the factors that the next ones start from are in no checkpoint: a run that is resumed begins
    with whole steps again, and does not go on bit for bit.
    """
    if section.reduce == "powersgd":
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=4, start_powerSGD_iter=2)
        size = dist.get_world_size(group)

        def add_up_factors(bucket: Any) -> Any:
            future = powerSGD_hook.powerSGD_hook(state, bucket)
            if not bucket.buffer().is_cuda:
                # With gloo another thread begins a bucket's second exchange when its first one is done: in
                # one process before the first one of the next bucket, in another after it.
                future.wait()
            return future.then(lambda done: done.value().mul_(size))  # torch's hook averages

        wrapped.register_comm_hook(None, lambda _, bucket: add_up_factors(bucket))
        return
    wire = torch.bfloat16 if section.reduce == "bf16" else None
    wrapped.register_comm_hook(None, lambda _, bucket: _add_up(bucket.buffer(), wire, group))


def _add_up(buffer: Tensor, wire: torch.dtype | None, group: Any) -> Any:
    sent = buffer if wire is None else buffer.to(wire)
    future = cast(Any, dist.all_reduce(sent, group=group, async_op=True)).get_future()

    def take(done: Any) -> Tensor:
        total = done.value()[0]  # raises where another process was lost, also when there is nothing to copy
        return buffer if wire is None else buffer.copy_(total)

    return future.then(take)


def synchronize_gradients(module: nn.Module, section: ParallelSection, *, last: bool) -> None:
    """Before a micro-batch: gradients are shared after the last one of a step alone.

    With ZeRO 2 and 3 they are shared after each, which is what keeps their memory small.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last or section.zero > 1)
        if section.zero < 3:
            module.set_reshard_after_backward(last)
        module.set_is_last_backward(last)
    elif isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = last
    elif isinstance(module, LossModule):
        module.is_last = last


def _has_experts(module: nn.Module) -> bool:
    return any("Experts" in type(part).__name__ for part in module.modules())
