"""What the machine can do, measured in the same run: memory reads and bf16 products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def _best(function: Callable[[], Any], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def memory_bandwidth(num_bytes: int, num_threads: int) -> dict[str, Any]:
    """GB/s of the quickest way to read ``num_bytes`` once: what decoding could at most reach."""
    torch.set_num_threads(num_threads)
    floats = torch.ones(num_bytes // 4)
    ways = {"sum": lambda: torch.sum(floats), "dot": lambda: torch.dot(floats, floats)}
    # A product of one row with packed bf16 weights, as an engine reads them.
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        weight = torch.randn(6144, 1024).to(torch.bfloat16)
        count = max(1, num_bytes // weight.nbytes)
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, 1) for _ in range(count)]
        row = torch.randn(1, 1024).to(torch.bfloat16)

        def products() -> None:
            for matrix in packed:
                torch.ops.mkldnn._linear_pointwise(row, matrix, None, "none", [], "")

        ways["packed bf16 linear, one row"] = products
    rates = {name: num_bytes / _best(way, 6) / 1e9 for name, way in ways.items()}
    best = max(rates, key=lambda name: rates[name])
    return {"GB/s": rates[best], "by": best, "all": rates, "bytes": num_bytes}


def matmul_rate(num_threads: int, scale: int = 1) -> dict[str, Any]:
    """GFLOP/s of torch's quickest bf16 product over some shapes, plain and with packed weights."""
    torch.set_num_threads(num_threads)
    rates = {}
    for tokens, inputs, outputs in ((2048, 1024, 6144), (2048, 3072, 1024), (4096, 4096, 4096)):
        m, k, n = tokens // scale, inputs // scale, outputs // scale
        x, w = torch.randn(m, k).to(torch.bfloat16), torch.randn(n, k).to(torch.bfloat16)
        ways = {"linear": lambda x=x, w=w: torch.nn.functional.linear(x, w)}
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            packed = torch.ops.mkldnn._reorder_linear_weight(w, m)
            ways["packed linear"] = lambda x=x, p=packed: torch.ops.mkldnn._linear_pointwise(
                x, p, None, "none", [], ""
            )
        for name, way in ways.items():
            rates[f"{name} {m}x{k}x{n}"] = 2 * m * k * n / _best(way, 5) / 1e9
    best = max(rates, key=lambda name: rates[name])
    return {"GFLOP/s": rates[best], "by": best, "all": rates}
