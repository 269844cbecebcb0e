"""What every attention layer needs to know about the step under way.

Legend: T query tokens of the step, N sequences, B blocks of a sequence at most, S tokens in a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hearth.engine.plan import Plan


def _int32(*shape: int) -> np.ndarray:
    return np.zeros(shape or (0,), np.int32)


@dataclass
class StepContext:
    """One object per engine, refilled before each step; the layers' KV objects all point to it."""

    block_size: int
    device: torch.device
    starts: list[int] = field(default_factory=list)  # [N] tokens of each sequence computed before
    counts: list[int] = field(default_factory=list)  # [N] tokens of each sequence in this step
    firsts: list[int] = field(default_factory=list)  # [N] where each sequence's tokens begin in the step
    block_ids: list[tuple[int, ...]] = field(default_factory=list)
    starts_np: np.ndarray = field(default_factory=_int32)  # the same as int32 [N]
    counts_np: np.ndarray = field(default_factory=_int32)
    firsts_np: np.ndarray = field(default_factory=_int32)
    tables_np: np.ndarray = field(default_factory=lambda: _int32(0, 0))  # [N, >= B]
    slots_np: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [T]
    positions_np: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [T]
    needs_modules: bool = False  # whether a row needs the model's modules one by one (adapters)
    _cache: dict[object, Any] = field(default_factory=dict)
    _known_ids: list[tuple[int, ...]] = field(default_factory=list)  # what the rows of the room hold
    _table_room: np.ndarray = field(default_factory=lambda: _int32(0, 0))
    _workspace: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.uint8))

    def fill(self, plan: Plan) -> None:
        rows = plan.rows
        size = self.block_size
        self.starts = [row.start for row in rows]
        self.counts = [row.num_tokens for row in rows]
        self.starts_np = np.array(self.starts, np.int32)
        self.counts_np = np.array(self.counts, np.int32)
        ends = np.cumsum(self.counts_np, dtype=np.int32)
        self.firsts_np = ends - self.counts_np
        self.firsts = self.firsts_np.tolist()
        self.block_ids = [row.block_ids for row in rows]
        self._fill_tables(self.block_ids)
        sequence_T = np.repeat(np.arange(len(rows)), self.counts_np)
        self.positions_np = (
            np.arange(ends[-1], dtype=np.int64) + (self.starts_np - self.firsts_np)[sequence_T]
        )
        blocks_T = self.tables_np[sequence_T, self.positions_np // size].astype(np.int64)
        self.slots_np = blocks_T * size + self.positions_np % size
        self._cache.clear()

    def _fill_tables(self, block_ids: list[tuple[int, ...]]) -> None:
        """Bring the tables up to date. From step to step few rows change, and turning a long tuple into
        numbers takes many times as long as seeing that it is the same."""
        width = max(map(len, block_ids))
        room = self._table_room
        if room.shape[0] < len(block_ids) or room.shape[1] < width:
            room = self._table_room = _int32(max(len(block_ids), room.shape[0]), -(-width // 16) * 16)
            self._known_ids = []
        known = self._known_ids
        for i, ids in enumerate(block_ids):
            if i >= len(known) or ids != known[i]:
                room[i, : len(ids)] = ids
        self._known_ids = block_ids + known[len(block_ids) :]  # rows that this step lacks stay as they are
        self.tables_np = room[: len(block_ids)]

    def workspace(self, num_bytes: int) -> int:
        """The address of this much memory, aligned to 64 bytes and zero when new; layers take turns."""
        if self._workspace.numel() < num_bytes + 64:
            self._workspace = torch.zeros(2 * num_bytes + 64, dtype=torch.uint8)
        address = self._workspace.data_ptr()
        return address + -address % 64

    def forget(self) -> None:
        """Drop what the layers share."""
        self._cache.clear()

    def cached(self, key: object, make: Callable[[], Any]) -> Any:
        """A value that all layers of this step share, made by the first that asks."""
        value = self._cache.get(key)
        if value is None:
            value = self._cache[key] = make()
        return value

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] block and offset of each token's slot, on the device."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            slots = torch.from_numpy(self.slots_np).to(self.device)
            return slots // self.block_size, slots % self.block_size

        pair: tuple[torch.Tensor, torch.Tensor] = self.cached("slots", make)
        return pair
