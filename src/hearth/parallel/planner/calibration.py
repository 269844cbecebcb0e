"""What this machine's processor can do, measured in a second: the rates that the tables have for GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable

from hearth.parallel.planner.hardware import LINKS, Cluster, Device
from hearth.parallel.planner.job import Precision

_ROUNDS = 5


def measure_cpu(num_processes: int, *, precision: Precision = "bf16") -> Cluster:
    """A cluster of processes on this machine, with the threads that torch uses now, each with its share.

    Products of the size of a small model's, and a product of two large tensors by element.
    """
    import torch

    from hearth.telemetry.hardware import find_hardware

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    left, right = torch.randn(1024, 512).to(dtype), torch.randn(512, 1536).to(dtype)
    product = _best(lambda: torch.mm(left, right))
    a, b = torch.randn(1 << 22), torch.randn(1 << 22)
    out = torch.empty_like(a)
    moved = _best(lambda: torch.mul(a, b, out=out))
    small = torch.randn(8)
    many = 200
    launch = _best(lambda: [small.mul(small) for _ in range(many)]) / many
    memory = find_hardware().memory_bytes // num_processes
    rate = 2.0 * 1024 * 512 * 1536 / product
    device = Device(
        name="this CPU",
        memory=memory,
        peak=rate,
        matmul=rate,
        fp8_matmul=None,
        bandwidth=3 * a.nbytes / moved,
        link="local",
        per_node=num_processes,
        launch=launch * 4,  # with autograd and Python around it
    )
    return Cluster(device, num_processes, LINKS["local"], LINKS["local"], num_processes)


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
