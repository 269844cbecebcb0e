"""Paged attention on a CPU: numba kernels for decoding, torch's fused attention for long chunks.

Legend: T query tokens of the step, H query heads, K KV heads, D/E key and value dims.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from hearth.engine.attention import numba_kernels, torch_path
from hearth.engine.attention.step import StepContext

if TYPE_CHECKING:
    from hearth.engine.attention.layer import LayerSpec, Pool

# Query tokens of a sequence from which gathering for torch's matrix-unit kernels is quicker than the numba
# kernel, which reads the context anew for every query token.
LONG_CHUNK = 16
# Positions x KV heads below which waking another thread costs more than it saves (about 0.2 ms of work).
_WORTH_A_THREAD = 4096


def view(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as numpy sees it; bfloat16, unknown to numpy, as uint16."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


class NumbaLayer:
    """The compiled kernels of one layer and its pool as numpy arrays."""

    def __init__(self, spec: LayerSpec, pool: Pool, block_size: int) -> None:
        self.spec, self.pool = spec, pool
        self.keys_np, self.values_np = view(pool.keys), view(pool.values)
        none = np.zeros((0, 0, 0), np.float32)
        self.key_scales_np = none if pool.key_scales is None else pool.key_scales.numpy()
        self.value_scales_np = none if pool.value_scales is None else pool.value_scales.numpy()
        self.quantised = pool.key_scales is not None
        self.scale = np.float32(spec.scale)
        self.cap = np.float32(spec.softcap)
        self.sinks: np.ndarray = np.zeros(0, np.float32)
        self.kernel = numba_kernels.make_kernel(
            spec.key_dim,
            spec.value_dim,
            spec.num_heads // spec.num_kv_heads,
            block_size,
            softcap=bool(spec.softcap),
            sinks=spec.sinks,
            quantised=self.quantised,
        )

    def __call__(
        self,
        step: StepContext,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKE: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend; returns [T, H, E]."""
        key, value = view(key_TKD), view(value_TKE)
        if self.quantised:
            numba_kernels.write_slots_int8(
                key, value, self.keys_np, self.values_np, self.key_scales_np, self.value_scales_np,
                step.slots_np,
            )  # fmt: skip
        else:
            numba_kernels.write_slots(key, value, self.keys_np, self.values_np, step.slots_np)
        out_THE = torch.empty(query_THD.shape[0], self.spec.num_heads, self.spec.value_dim)
        num_kv_heads = self.spec.num_kv_heads
        work: _Work = step.cached(("work", num_kv_heads), lambda: _Work(step, num_kv_heads))
        if sinks_H is not None and not len(self.sinks):
            self.sinks = sinks_H.detach().float().contiguous().numpy()
        if work.parts:
            self._decode(work, step, view(query_THD), out_THE.numpy())
        for sequence in work.long:
            span = slice(step.firsts[sequence], step.firsts[sequence] + step.counts[sequence])
            out_THE[span] = torch_path.prefill(step, self.spec, self.pool, query_THD[span], sequence, sinks_H)
        return out_THE.to(query_THD.dtype)

    def _decode(self, work: _Work, step: StepContext, query: np.ndarray, out: np.ndarray) -> None:
        def run(begin: int, end: int) -> None:
            self.kernel(
                query, self.keys_np, self.values_np, self.key_scales_np, self.value_scales_np,
                out, step.tables_np, work.items, begin, end,
                self.scale, self.cap, self.spec.window, self.sinks,
            )  # fmt: skip

        run_parts(run, work.parts)


class _Work:
    """How a step's query tokens are divided: long chunks to torch, the rest in equal parts to threads."""

    def __init__(self, step: StepContext, num_kv_heads: int) -> None:
        counts = step.counts_np
        self.long = np.flatnonzero(counts >= LONG_CHUNK).tolist()
        short = np.flatnonzero(counts < LONG_CHUNK)
        sequence = np.repeat(short, counts[short])
        begins = np.cumsum(counts[short]) - counts[short]
        offset = np.arange(len(sequence)) - np.repeat(begins, counts[short])
        items = (sequence, step.firsts_np[sequence] + offset, step.starts_np[sequence] + offset + 1)
        self.items = np.stack(items, axis=1).astype(np.int32)
        self.parts = split(np.repeat(self.items[:, 2], num_kv_heads), torch.get_num_threads())


def split(costs: np.ndarray, num_threads: int) -> list[tuple[int, int]]:
    """Cut units of work with these costs into at most ``num_threads`` runs of about equal cost."""
    if not len(costs):
        return []
    cumulative = np.cumsum(costs)
    num_parts = int(max(1, min(num_threads, cumulative[-1] // _WORTH_A_THREAD)))
    targets = cumulative[-1] * np.arange(1, num_parts) / num_parts
    cuts = [0, *(np.searchsorted(cumulative, targets) + 1).tolist(), len(costs)]
    return [(a, b) for a, b in itertools.pairwise(cuts) if b > a]


def run_parts(run: Callable[[int, int], None], parts: list[tuple[int, int]]) -> None:
    """Call ``run(begin, end)`` for every part at once; it must release the interpreter to gain from it."""
    others = [_threads().submit(run, *part) for part in parts[1:]]
    run(*parts[0])
    for other in others:
        other.result()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Threads beside the caller's. Plain ones, because two engines cannot share numba's own thread layers."""
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), "hearth-attention")
