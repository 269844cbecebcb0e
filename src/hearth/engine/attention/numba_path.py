"""Paged attention on a CPU: numba kernels for decoding, torch's fused attention for long chunks.

Legend: T query tokens of the step, H query heads, K KV heads, D/E key and value dims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hearth.engine.attention import numba_kernels, torch_path
from hearth.engine.attention.step import StepContext

if TYPE_CHECKING:
    from hearth.engine.attention.layer import LayerSpec

# Query tokens of a sequence from which gathering for torch's matrix-unit kernels is quicker than the numba
# kernel; measured with `benchmarks/engine.py`.
LONG_CHUNK = 16
TILE = 4  # query tokens of one sequence that share a pass over its keys and values


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels can read keys and values of this type."""
    return dtype in (torch.float32, torch.bfloat16)


def view(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as numpy sees it; bfloat16, unknown to numpy, as uint16."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


class NumbaLayer:
    """The compiled kernels of one layer and its pool as numpy arrays."""

    def __init__(self, spec: LayerSpec, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.spec = spec
        self.keys, self.values = keys, values
        self.keys_np, self.values_np = view(keys), view(values)
        self.group = spec.num_heads // spec.num_kv_heads
        self.bf16 = keys.dtype is torch.bfloat16
        self.scale = np.float32(spec.scale)
        self.cap = np.float32(spec.softcap)
        self.no_sinks = np.zeros(0, np.float32)

    def kernel(self, tile: int, *, parallel: bool) -> Any:
        return numba_kernels.make_kernel(
            self.spec.key_dim,
            self.spec.value_dim,
            self.group,
            self.keys.shape[2],
            tile,
            bf16=self.bf16,
            softcap=bool(self.spec.softcap),
            sinks=self.spec.sinks,
            parallel=parallel,
        )

    def __call__(
        self,
        step: StepContext,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKE: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        numba_kernels.make_writer(parallel=False)(
            view(key_TKD), view(value_TKE), self.keys_np, self.values_np, step.slots_np
        )
        num_tokens = query_THD.shape[0]
        out_THE = torch.empty(num_tokens, self.spec.num_heads, self.spec.value_dim, dtype=torch.float32)
        work: _Work = step.cached("numba", lambda: _Work(step))  # type: ignore[assignment]
        sinks = self.no_sinks if sinks_H is None else sinks_H.detach().float().contiguous().numpy()
        for tile, items, lengths, parallel in work.launches:
            self.kernel(tile, parallel=parallel)(
                view(query_THD),
                self.keys_np,
                self.values_np,
                out_THE.numpy(),
                step.tables_np,
                items,
                lengths,
                self.scale,
                self.cap,
                self.spec.window,
                sinks,
            )
        for sequence in work.long:
            span = slice(step.firsts[sequence], step.firsts[sequence] + step.counts[sequence])
            out_THE[span] = torch_path.prefill(
                step, self.spec, self.keys, self.values, query_THD[span], sequence, sinks_H
            )
        return out_THE.to(query_THD.dtype)


class _Work:
    """How a step's query tokens are divided among kernels; the same for every layer."""

    # Context tokens x sequences below which waking another thread costs more than it saves.
    PARALLEL_FROM = 512

    def __init__(self, step: StepContext) -> None:
        self.long = [i for i, count in enumerate(step.counts) if count >= LONG_CHUNK]
        decode: list[tuple[int, int, int, int]] = []
        chunks: list[tuple[int, int, int, int]] = []
        for i, count in enumerate(step.counts):
            if count >= LONG_CHUNK:
                continue
            tile = 1 if count == 1 else TILE
            target = decode if count == 1 else chunks
            for offset in range(0, count, tile):
                first = step.firsts[i] + offset
                target.append((i, first, min(tile, count - offset), step.starts[i] + offset + 1))
        self.launches = []
        for tile, work in ((1, decode), (TILE, chunks)):
            if work:
                array = np.array(work, np.int32)
                parallel = torch.get_num_threads() > 1 and int(array[:, 3].sum()) >= self.PARALLEL_FROM
                items, lengths = np.ascontiguousarray(array[:, :3]), np.ascontiguousarray(array[:, 3])
                self.launches.append((tile, items, lengths, parallel))
