"""What this machine's processor can do, measured in a second: the rates that the tables have for GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

from hearth.parallel.planner.hardware import LINKS, Cluster, Device
from hearth.parallel.planner.job import Precision

_ROUNDS = 7
# Time of an operator in a training step over that of the same call in a loop: Python around it, autograd's
# bookkeeping on the way there and back.
_OVERHEAD = 4.0


def cpu_precision(requested: str) -> Precision:
    """What ``train.precision`` means on this processor."""
    if requested != "auto":
        return cast(Precision, requested)
    import torch

    # As hearth.training.precision asks; the probes are private to torch and may be absent.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bf16" if any(getattr(torch.cpu, name, bool)() for name in names) else "fp32"


def measure_cpu(
    num_processes: int,
    *,
    precision: Precision = "bf16",
    memory: int | None = None,
    price: float | None = None,
) -> Cluster:
    """A cluster of processes on this machine, each with the threads that torch uses now.

    Rates of matrix products of a small model's size and of a product by element of large tensors, and the
    time of the smallest operator. ``memory``: bytes of a process; default: an equal share of the machine's.
    """
    import torch

    from hearth.telemetry.hardware import find_hardware

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    left, right = torch.randn(1024, 512).to(dtype), torch.randn(512, 1536).to(dtype)
    rate = 2.0 * 1024 * 512 * 1536 / _best(lambda: torch.mm(left, right))
    a, b = torch.randn(1 << 22), torch.randn(1 << 22)
    out = torch.empty_like(a)
    moved = _best(lambda: torch.mul(a, b, out=out))
    small, many = torch.randn(8), 200
    call = _best(lambda: [small.mul(small) for _ in range(many)]) / many
    device = Device(
        name="this CPU",
        memory=memory or find_hardware().memory_bytes // num_processes,
        peak=rate,
        matmul=rate,
        fp8_matmul=None,
        bandwidth=3 * a.nbytes / moved,
        link="local",
        per_node=num_processes,
        launch=_OVERHEAD * call,
    )
    return Cluster(device, num_processes, LINKS["local"], LINKS["local"], num_processes, price)


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
