"""Copies KV blocks between the device and ordinary memory, as a plan says. `HostPool` says which."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from hearth.engine.attention.layer import LayerKV
from hearth.engine.plan import Plan
from hearth.errors import EngineError


class HostBlocks:
    """For each layer ``num_slots`` blocks as raw bytes; page-locked if the layers are on a GPU."""

    def __init__(self, layers: Sequence[LayerKV], num_slots: int) -> None:
        """Raises `EngineError` if there is not memory enough."""
        self.layers = list(layers)
        try:
            self._stores = [
                torch.empty(
                    num_slots,
                    layer.num_bytes // layer.num_blocks,
                    dtype=torch.uint8,
                    pin_memory=layer.step.device.type == "cuda",
                )
                for layer in self.layers
            ]
        except (MemoryError, RuntimeError) as error:
            raise EngineError(
                f"not enough memory for swapping: {error}", fix="lower swap_memory, or set it to 0"
            ) from error

    def copy(self, plan: Plan) -> None:
        """Make the copies of ``plan``, those out before those in."""
        if plan.swap_out:
            blocks, slots = zip(*plan.swap_out, strict=True)
            for layer, store in zip(self.layers, self._stores, strict=True):
                store[list(slots)] = layer.read_blocks(blocks).cpu()
        if plan.swap_in:
            slots, blocks = zip(*plan.swap_in, strict=True)
            for layer, store in zip(self.layers, self._stores, strict=True):
                layer.write_blocks(blocks, store[list(slots)])

    def measure(self) -> float:
        """Bytes per second of copying blocks to their slots and back; leaves the blocks as they are."""
        count = min(len(self._stores[0]), self.layers[0].num_blocks, 4)
        pairs = tuple((i, i) for i in range(count))
        plan = Plan((), swap_out=pairs, swap_in=pairs)
        best = float("inf")
        for _ in range(3):  # the first one touches the memory
            started = time.perf_counter()
            self.copy(plan)
            if self.layers[0].step.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return 2 * count * block_bytes(self.layers) / best


def block_bytes(layers: Sequence[LayerKV]) -> int:
    """Bytes of one block in all layers."""
    return sum(layer.num_bytes // layer.num_blocks for layer in layers)
