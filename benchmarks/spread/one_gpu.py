"""One GPU: FSDP2 with compiled layers beside the same loop and the same compiled layers without it."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torch.distributed as dist
from spread.jobs import Plain, Shape, new_model, new_rows, recipe_of
from spread.launch import free_port
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hearth.config.parallel import ParallelSection
from hearth.parallel.layout import DIMENSIONS, Layout
from hearth.parallel.meeting import leave
from hearth.parallel.sharding import shard_weights
from hearth.parallel.world import World
from hearth.training.compiling import compile_blocks

_WARM_UP = 3


def one_gpu(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every step but the first ones, in turns."""
    device = torch.device(job["device"], 0) if job["device"] == "cuda" else torch.device("cpu")
    shape = Shape(**job["shape"])
    address = f"tcp://127.0.0.1:{free_port()}"
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
    try:
        mesh = init_device_mesh(device.type, (1,) * len(DIMENSIONS), mesh_dim_names=DIMENSIONS)
        return _measure(job, shape, World(Layout(), device, mesh=mesh))
    finally:
        leave()


def _measure(job: dict[str, Any], shape: Shape, world: World) -> dict[str, Any]:
    model, rows = new_model(shape.size), new_rows(shape.length)
    recipe = recipe_of(shape, {}, job["precision"])
    loops: dict[str, Plain] = {}
    why = None
    for name, loss in (("plain torch", "torch"), ("plain torch, our loss", "hearth"), ("FSDP2", "hearth")):
        own = copy.deepcopy(model).to(world.device)
        why = compile_blocks(own, world.device)

        def shard(module: nn.Module) -> nn.Module:
            shard_weights(module, world, ParallelSection())
            return module

        loops[name] = Plain(own, recipe, world, loss=loss, spread=shard if name == "FSDP2" else None)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for step in range(job["steps"] + _WARM_UP):
        for name, loop in loops.items():
            started = time.perf_counter()
            loop.step(rows, step)  # ends with a number, which waits for the device
            if step >= _WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {"seconds": seconds, "not compiled": why}
