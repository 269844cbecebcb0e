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


@dataclass
class StepContext:
    """One object per engine, refilled before each step; the layers' KV objects all point to it."""

    block_size: int
    device: torch.device
    starts: list[int] = field(default_factory=list)  # [N] tokens of each sequence computed before
    counts: list[int] = field(default_factory=list)  # [N] tokens of each sequence in this step
    firsts: list[int] = field(default_factory=list)  # [N] where each sequence's tokens begin in the step
    block_ids: list[tuple[int, ...]] = field(default_factory=list)
    tables_np: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))  # [N, B]
    slots_np: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [T]
    positions_np: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [T]
    _cache: dict[object, Any] = field(default_factory=dict)

    def fill(self, plan: Plan) -> None:
        rows = plan.rows
        size = self.block_size
        self.starts = [row.start for row in rows]
        self.counts = [row.num_tokens for row in rows]
        self.firsts = np.cumsum([0, *self.counts[:-1]]).tolist()
        self.block_ids = [row.block_ids for row in rows]
        width = max(len(row.block_ids) for row in rows)
        self.tables_np = np.zeros((len(rows), width), np.int32)
        self.slots_np = np.empty(plan.num_tokens, np.int64)
        self.positions_np = np.empty(plan.num_tokens, np.int64)
        for i, row in enumerate(rows):
            self.tables_np[i, : len(row.block_ids)] = row.block_ids
            positions = np.arange(row.start, row.end)
            span = slice(self.firsts[i], self.firsts[i] + row.num_tokens)
            self.positions_np[span] = positions
            self.slots_np[span] = (
                self.tables_np[i, positions // size].astype(np.int64) * size + positions % size
            )
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
