"""Paged attention on a GPU: how the Triton kernels are launched.

Legend: T query tokens of the step, N sequences, B blocks of a sequence, H query heads, K KV heads, D/E key
and value dims.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hearth.engine.attention.step import StepContext

if TYPE_CHECKING:
    from hearth.engine.attention.layer import LayerSpec, Pool

STEP_KEY = "triton"  # under which the layers of a step find its `DeviceStep`
_ROWS = 64  # query tokens x heads of a tile of a long chunk
_SHORT_ROWS = 16  # of a decode: what the matrix units take at least
_MOST_SPLITS = 32
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def unsuited(dtype: torch.dtype, device: torch.device) -> str:
    """Why the Triton kernels cannot run here; empty if they can."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it computes on a GPU, not on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not know {dtype}"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return ""


@dataclass
class Tiles:
    """Pieces of sequences, one a program: int32 [n, 4] sequence, first row, rows, position of the first."""

    table: torch.Tensor
    queries: int  # rows of a tile at most
    splits: int


@dataclass
class DeviceStep:
    """A step in the device's memory. ``tiles`` of a graph are fixed; of another step they are made as asked.

    slots [T] int: block * block size + offset, negative for padding; tables [N, >= B] int32.
    """

    slots: torch.Tensor
    tables: torch.Tensor
    starts_np: np.ndarray
    counts_np: np.ndarray
    firsts_np: np.ndarray
    decode_table: torch.Tensor | None = None

    @classmethod
    def of(cls, step: StepContext) -> DeviceStep:
        slots = torch.from_numpy(step.slots_np).to(step.device, non_blocking=True)
        tables = torch.from_numpy(np.ascontiguousarray(step.tables_np)).to(step.device, non_blocking=True)
        return cls(slots, tables, step.starts_np, step.counts_np, step.firsts_np)

    def tiles(self, group: int, num_kv_heads: int) -> list[Tiles]:
        """What to launch: the sequences with few tokens in splits, the others in larger tiles."""
        short = _SHORT_ROWS // min(group, _SHORT_ROWS)
        if self.decode_table is not None:
            splits = num_splits(len(self.decode_table), num_kv_heads, _num_processors(self.slots.device))
            return [Tiles(self.decode_table, short, splits)]
        launches = []
        is_short = self.counts_np <= short
        for chosen, queries in ((is_short, short), (~is_short, max(short, _ROWS // group))):
            rows = np.flatnonzero(chosen)
            if not len(rows):
                continue
            table = cut(rows, self.firsts_np[rows], self.counts_np[rows], self.starts_np[rows], queries)
            splits = 1
            if chosen is is_short:
                splits = num_splits(len(table), num_kv_heads, _num_processors(self.slots.device))
            launches.append(Tiles(torch.from_numpy(table).to(self.slots.device), queries, splits))
        return launches


def cut(
    sequences: np.ndarray, firsts: np.ndarray, counts: np.ndarray, starts: np.ndarray, queries: int
) -> np.ndarray:
    """Tiles of at most ``queries`` tokens that cover ``counts`` tokens of each sequence; int32 [n, 4]."""
    pieces = -(-counts // queries)
    which = np.repeat(np.arange(len(counts)), pieces)
    offset = (np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * queries
    size = np.minimum(queries, counts[which] - offset)
    columns = (sequences[which], firsts[which] + offset, size, starts[which] + offset)
    return np.stack(columns, axis=1).astype(np.int32)


def num_splits(num_tiles: int, num_kv_heads: int, num_processors: int) -> int:
    """Into how many parts each context is cut, so that about two programs meet every processor; a power of
    two, because each value is a kernel of its own. It depends on no length: a graph replays it for all."""
    wanted = -(-2 * num_processors // max(1, num_tiles * num_kv_heads))
    return min(_MOST_SPLITS, 1 << max(0, wanted - 1).bit_length())


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


class TritonLayer:
    """One layer's pool, read by the Triton kernels."""

    def __init__(self, spec: LayerSpec, pool: Pool, block_size: int) -> None:
        self.spec, self.pool, self.block_size = spec, pool, block_size
        self.group = 1 << (spec.num_heads // spec.num_kv_heads - 1).bit_length()

    def __call__(
        self,
        step: StepContext,
        query_THD: torch.Tensor,
        key_TKD: torch.Tensor,
        value_TKE: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend; returns [T, H, E]."""
        spec = self.spec
        device_step: DeviceStep = step.cached(STEP_KEY, lambda: DeviceStep.of(step))
        launches: list[Tiles] = step.cached(
            (STEP_KEY, self.group, spec.num_kv_heads),
            lambda: device_step.tiles(self.group, spec.num_kv_heads),
        )
        self._store(device_step, key_TKD, self.pool.keys, self.pool.key_scales)
        self._store(device_step, value_TKE, self.pool.values, self.pool.value_scales)
        query_THD = query_THD if query_THD.stride(2) == 1 else query_THD.contiguous()
        sinks = None if sinks_H is None else sinks_H.detach().float().contiguous()
        out_THE = query_THD.new_empty(query_THD.shape[0], spec.num_heads, spec.value_dim)
        for tiles in launches:
            self._attend(device_step, tiles, query_THD, sinks, out_THE)
        return out_THE

    def _store(
        self, step: DeviceStep, new: torch.Tensor, pool: torch.Tensor, scales: torch.Tensor | None
    ) -> None:
        from hearth.engine.attention.triton_kernels import store_kernel

        new = new if new.stride(2) == 1 else new.contiguous()
        num_tokens, num_kv_heads, dim = new.shape
        store_kernel[(num_tokens, num_kv_heads)](
            new, pool, pool if scales is None else scales, step.slots, step.slots.stride(0),
            new.stride(0), new.stride(1),
            K=num_kv_heads, S=self.block_size, DIM=dim, DIMP=_padded(dim), SCALED=scales is not None,
            LARGEST=_LARGEST.get(pool.dtype, 0.0), ROUNDS=pool.dtype is torch.int8,
        )  # fmt: skip

    def _attend(
        self,
        step: DeviceStep,
        tiles: Tiles,
        query_THD: torch.Tensor,
        sinks_H: torch.Tensor | None,
        out_THE: torch.Tensor,
    ) -> None:
        from hearth.engine.attention.triton_kernels import attend_kernel, merge_kernel

        spec, pool = self.spec, self.pool
        num_tiles, (H, E) = len(tiles.table), out_THE.shape[1:]
        partial = lse = out_THE  # not touched without splits
        if tiles.splits > 1:
            shape = (num_tiles, tiles.queries, H, tiles.splits)
            partial = torch.empty(*shape, E, dtype=torch.float32, device=out_THE.device)
            lse = torch.empty(shape, dtype=torch.float32, device=out_THE.device)
        scaled = pool.key_scales is not None
        sinks = out_THE if sinks_H is None else sinks_H
        attend_kernel[(num_tiles, spec.num_kv_heads, tiles.splits)](
            query_THD, pool.keys, pool.values,
            pool.key_scales if scaled else pool.keys, pool.value_scales if scaled else pool.values,
            sinks, step.tables, tiles.table, out_THE, partial, lse,
            step.tables.stride(0), tiles.table.stride(0), query_THD.stride(0), query_THD.stride(1),
            spec.scale, spec.softcap, spec.window,
            H=H, K=spec.num_kv_heads, GP=self.group, QUERIES=tiles.queries,
            D=spec.key_dim, DP=_padded(spec.key_dim), E=E, EP=_padded(E), S=self.block_size,
            TILE=32 if max(spec.key_dim, E) > 128 else 64, SPLITS=tiles.splits, SCALED=scaled,
            SOFTCAP=bool(spec.softcap), WINDOW=bool(spec.window), SINKS=sinks_H is not None,
            # On matrix units float32 would be rounded to 19 bits.
            PRECISION="ieee" if query_THD.dtype is torch.float32 else "tf32",
            UPCAST=query_THD.device.type == "cpu",
        )  # fmt: skip
        if tiles.splits > 1:
            merge_kernel[(num_tiles * tiles.queries, H)](
                partial, lse, sinks, tiles.table, out_THE, tiles.table.stride(0),
                H=H, QUERIES=tiles.queries, E=E, EP=_padded(E), SPLITS=tiles.splits,
                SPLITSP=tiles.splits, SINKS=sinks_H is not None,
            )  # fmt: skip
