"""Pipeline schedules: how long processes wait, and for how many micro-batches they keep activations."""

from __future__ import annotations

from typing import Literal

Schedule = Literal["1f1b", "interleaved", "zero_bubble"]


def bubble_share(
    schedule: Schedule,
    *,
    stages: int,
    chunks: int,
    micro_batches: int,
    backward_ratio: float = 2.0,
) -> float:
    """Waiting of a pipeline process as a share of its work, with p stages and m micro-batches.

    1f1b: (p - 1) / m (Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters",
    section 2.2.1). interleaved with v chunks: (p - 1) / (v m) (section 2.2.2). zero_bubble is interleaved
    with weights' gradients W in the gaps: (p - 1)(F + B - W) / (v m (F + B + W)) with F and B the times of
    forward and input gradient (Qi et al. 2024, "Zero bubble pipeline parallelism", table 2, ZB-H1): a third
    of it for F = B = W. ``backward_ratio``: time of the backward pass over that of the forward pass, 2
    without recomputation and 3 with all of it; W takes as long as F.
    """
    if stages == 1:
        return 0.0
    p, m = stages, micro_batches
    if schedule == "1f1b":
        return (p - 1) / m
    if schedule == "interleaved":
        return (p - 1) / (chunks * m)
    waiting = (1.0 + backward_ratio - 2.0) / (1.0 + backward_ratio)  # F = W = 1, B = ratio - W
    return max(0.0, waiting) * (p - 1) / (chunks * m)


def in_flight(schedule: Schedule, *, stage: int, stages: int, chunks: int, micro_batches: int) -> float:
    """Micro-batches whose activations a process keeps at most, each for all of its layers.

    1f1b: p - stage (Narayanan et al. 2021, section 2.2.1). interleaved: with v chunks the warm-up has
    2 (p - stage - 1) + (v - 1) p chunks, and one more runs (Megatron-LM's schedule; Korthikanti et al. 2022,
    section 4.2.3, gives the same 1 + (p - 1) / (p v) for stage 0). zero_bubble: as interleaved, whose order
    of forward passes it has.
    """
    if stages == 1:
        return 1.0
    if schedule == "1f1b":
        return float(min(micro_batches, stages - stage))
    warm_up = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(micro_batches * chunks, warm_up) / chunks
