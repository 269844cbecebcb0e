"""Decode steps at fixed addresses, so that a GPU can replay them as one CUDA graph.

A decode step of a small model is hundreds of short kernels, and launching them one by one takes the host
longer than the GPU computes. So the forward pass is captured once for each of a few batch sizes (*buckets*)
and replayed with new inputs in the same buffers. A batch between two buckets is padded: a padding row stores
nothing (slot -1) and sees nothing.

Legend: N decoding sequences, B blocks of the longest sequence, V vocabulary.
"""

from __future__ import annotations

import bisect
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hearth.engine.attention.step import StepContext
from hearth.engine.attention.triton_path import STEP_KEY, DeviceStep
from hearth.engine.plan import Plan

if TYPE_CHECKING:
    from hearth.engine.runner import Runner

logger = logging.getLogger(__name__)

_WARM_UPS = 2  # passes before a capture: kernels compile, libraries allocate
# Columns of the inputs; the block table follows.
_TOKEN, _POSITION, _SLOT, _TILE, _TABLE = 0, 1, 2, 3, 7


def buckets(max_batch: int) -> list[int]:
    """Batch sizes to capture, ascending, up to ``max_batch``: powers of two to 8, then steps of an eighth to
    a quarter of the size, so that padding wastes little."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < max_batch:
        sizes.append(sizes[-1] + max(8, 1 << (sizes[-1].bit_length() - 3)))
    return [*(size for size in sizes if size < max_batch), max_batch]


def bucket_for(num_sequences: int, sizes: list[int]) -> int | None:
    """The smallest bucket that holds so many; None if there is none."""
    at = bisect.bisect_left(sizes, num_sequences)
    return sizes[at] if at < len(sizes) else None


def install(runner: Runner, max_model_len: int, max_batch: int) -> DecodeGraphs | None:
    """Capture the decode steps of a runner; None where there is no GPU, or, with a warning, where the model
    cannot be captured. Stores nothing in the cache."""
    if runner.device.type != "cuda" or any(layer.path != "triton" for layer in runner.layers):
        return None
    max_blocks = -(-max_model_len // runner.step.block_size)
    graphs = DecodeGraphs(runner.model, runner.step, max_batch=max_batch, max_blocks=max_blocks)
    reason = graphs.capture_all()
    if reason:
        logger.warning("decoding without CUDA graphs: %s", reason)
        return None
    return graphs


class StaticInputs:
    """What a decode step reads, int32 [N, 7 + B] in one buffer: one copy to the device a step.

    Each row: token, position, slot, its tile (sequence, row, 1, position), its block table. A row of padding
    has slot -1 and its tile ends at position 0.
    """

    def __init__(self, max_batch: int, max_blocks: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.host = torch.zeros(max_batch, _TABLE + max_blocks, dtype=torch.int32, pin_memory=pinned)
        self.device = torch.zeros_like(self.host, device=device)
        self.host_np = self.host.numpy()
        self.clear(0, max_batch)
        self.device.copy_(self.host)

    def clear(self, begin: int, end: int) -> None:
        """Make these rows padding."""
        rows = self.host_np[begin:end]
        rows[:] = 0
        rows[:, _SLOT] = rows[:, _TILE + 3] = -1
        rows[:, _TILE + 1] = np.arange(begin, end)
        rows[:, _TILE + 2] = 1

    def fill(self, step: StepContext, plan: Plan, bucket: int) -> None:
        """Take the rows of a plan whose step is filled, pad to ``bucket``, and copy to the device."""
        n = len(plan.rows)
        rows = self.host_np[:n]
        rows[:, _TOKEN] = [row.token_ids[0] for row in plan.rows]
        rows[:, _POSITION] = rows[:, _TILE + 3] = step.starts_np
        rows[:, _SLOT] = step.slots_np
        rows[:, _TILE] = rows[:, _TILE + 1] = np.arange(n)
        rows[:, _TILE + 2] = 1
        width = min(step.tables_np.shape[1], rows.shape[1] - _TABLE)
        rows[:, _TABLE : _TABLE + width] = step.tables_np[:, :width]
        self.clear(n, bucket)
        self.device[:bucket].copy_(self.host[:bucket], non_blocking=True)

    def step(self, bucket: int) -> DeviceStep:
        """The views that attention reads."""
        rows, none = self.device[:bucket], np.zeros(0, np.int32)
        return DeviceStep(
            rows[:, _SLOT], rows[:, _TABLE:], none, none, none, decode_table=rows[:, _TILE : _TILE + 4]
        )


@dataclass
class _Captured:
    graph: Any  # torch.cuda.CUDAGraph
    logits_NV: torch.Tensor


class DecodeGraphs:
    """Runs plans of plain decodes: replays where ``capture`` and the device is a GPU, else step by step."""

    def __init__(
        self,
        model: Any,
        step: StepContext,
        *,
        max_batch: int,
        max_blocks: int,
        capture: bool = True,
    ) -> None:
        """``max_blocks`` of the longest sequence."""
        self.model, self.context = model, step
        self.sizes = buckets(max_batch)
        self.inputs = StaticInputs(max_batch, max_blocks, step.device)
        self.steps = {size: self.inputs.step(size) for size in self.sizes}
        self.capture = capture and step.device.type == "cuda"
        self.captured: dict[int, _Captured] = {}

    def bucket(self, plan: Plan) -> int | None:
        """The bucket for this plan; None if some row is no plain decode, or there are too many."""
        plain = all(
            row.num_tokens == 1
            and row.num_logits == 1
            and row.request.pooling is None
            and row.request.params.adapter is None
            for row in plan.rows
        )
        return bucket_for(len(plan.rows), self.sizes) if plain else None

    @torch.inference_mode()
    def run(self, plan: Plan, bucket: int) -> torch.Tensor:
        """Float32 logits [N, V] of the plan's sequences; they hold until the next run. The step is filled."""
        self.inputs.fill(self.context, plan, bucket)
        captured = self.captured.get(bucket)
        if captured is None:
            return self._forward(bucket)[: len(plan.rows)]
        captured.graph.replay()
        return captured.logits_NV[: len(plan.rows)]

    def _forward(self, bucket: int) -> torch.Tensor:
        """The pass that is captured: it reads and writes only at fixed addresses."""
        self.context.forget()
        self.context.cached(STEP_KEY, lambda: self.steps[bucket])
        rows = self.inputs.device[:bucket]
        output = self.model(
            input_ids=rows[:, _TOKEN].long()[None],
            position_ids=rows[:, _POSITION].long()[None],
            use_cache=False,
        )
        logits_NV: torch.Tensor = output.logits[0].float()
        return logits_NV

    @torch.inference_mode()
    def capture_all(self) -> str:
        """Capture every bucket, the largest first, so that the smaller ones fit into its memory.

        Returns why it could not be done: a model that asks the device for a number in the middle of its pass
        cannot be captured. Empty if it could; then nothing was stored in the cache.
        """
        if not self.capture:
            return "there is no GPU"
        started = time.perf_counter()
        pool = None
        try:
            for size in reversed(self.sizes):
                pool = self._capture(size, pool)
        except RuntimeError as error:
            self.captured.clear()
            return f"{type(error).__name__}: {error}"
        finally:
            self.context.forget()
        logger.info("captured %d decode graphs in %.1f s", len(self.sizes), time.perf_counter() - started)
        return ""

    def _capture(self, size: int, pool: Any) -> Any:
        self.inputs.clear(0, size)
        self.inputs.device[:size].copy_(self.inputs.host[:size])
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._forward(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits_NV = self._forward(size)
        self.captured[size] = _Captured(graph, logits_NV)
        return graph.pool()
