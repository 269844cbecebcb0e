"""What this machine's processor can do, measured in a second: the rates that the tables have for GPUs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import cast

from hearth.parallel.planner.facts import ModelFacts
from hearth.parallel.planner.hardware import LINKS, Cluster, Device
from hearth.parallel.planner.job import Precision
from hearth.parallel.planner.work import MEMORY_EFFICIENCY, PRODUCT_EFFICIENCY

_ROUNDS = 9
# Positions that a measurement takes at most.
_MOST_ROWS = 4096
# A training step has Python's modules around its operators, too.
_OVERHEAD = 1.5
# Activations of a step are more than any cache holds.
_BEYOND_CACHES = 96 << 20


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
    facts: ModelFacts,
    *,
    tokens: int,
    length: int,
    precision: Precision = "bf16",
    memory: int | None = None,
    price: float | None = None,
) -> Cluster:
    """A cluster of processes on this machine, each with the threads that torch uses now.

    Rates are those of the model's own shapes, with results in new memory, as in training: its largest matrix
    product over ``tokens`` positions, attention over rows of ``length``, a product by element of its
    activations, and the time of the smallest operator. ``memory``: bytes of a process; default: an equal
    share of the machine's.
    """
    import torch
    import torch.nn.functional as F

    from hearth.telemetry.hardware import find_hardware

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    rows, hidden = min(tokens, _MOST_ROWS), facts.hidden_size
    inner = max(max(layer.inner, layer.expert_inner) for layer in facts.layers)
    left, right = torch.randn(rows, hidden).to(dtype), torch.randn(inner, hidden).to(dtype)
    rate = 2.0 * rows * hidden * inner / _usual(lambda: torch.mm(left, right.T))
    one = 4 * rows * hidden
    tensors = [torch.randn(rows, hidden) for _ in range(max(2, _BEYOND_CACHES // one))]
    moved = _usual(lambda: [tensor * tensor for tensor in tensors]) / len(tensors)
    span = min(length, _MOST_ROWS)
    query = torch.randn(1, facts.num_heads, span, facts.head_dim).to(dtype)
    mask = torch.ones(1, 1, span, span, dtype=torch.bool).tril()
    attended = _usual(lambda: F.scaled_dot_product_attention(query, query, query, attn_mask=mask))
    device = Device(
        name="this CPU",
        memory=memory or find_hardware().memory_bytes // num_processes,
        peak=rate,
        # The planner takes off what shapes and memory cost, which is in these measurements already.
        matmul=rate / PRODUCT_EFFICIENCY,
        fp8_matmul=None,
        bandwidth=2 * one / moved / MEMORY_EFFICIENCY,
        link="local",
        per_node=num_processes,
        attention=4.0 * facts.query_width * span * span / attended,
        launch=_OVERHEAD * _seconds_per_operator(),
    )
    return Cluster(device, num_processes, LINKS["local"], LINKS["local"], num_processes, price)


def _seconds_per_operator() -> float:
    """Of the smallest operators, forward and backward."""
    import torch

    start, many = torch.ones(8, requires_grad=True), 100

    def chain() -> None:
        value = start
        for _ in range(many):
            value = value * start
        value.sum().backward()  # type: ignore[no-untyped-call]
        start.grad = None

    # Forward one operator each; backward two products and a sum.
    return _usual(chain) / (4 * many)


def _usual(work: Callable[[], object]) -> float:
    """The median time of a few calls after one to warm up."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
