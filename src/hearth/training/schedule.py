"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

# inverse_sqrt without warmup falls as if it had warmed up for so many steps, as in transformers.
_TIMESCALE = 10_000


def learning_rate_at(
    step: int,
    *,
    total_steps: int,
    peak: float,
    shape: str = "cosine",
    warmup_steps: int = 0,
    min_ratio: float = 0.1,
    decay_fraction: float = 0.2,
    decay_shape: str = "linear",
) -> float:
    """Learning rate of optimizer step ``step`` (0 ≤ step < total_steps).

    Linear warmup reaches ``peak`` at step ``warmup_steps - 1`` (the first step is not wasted at zero). Then:
    cosine and linear fall to ``min_ratio · peak``; wsd stays at the peak and falls over the last
    ``decay_fraction`` of all steps, linearly, as 1 - √x (Hägele et al. 2024) or as a cosine; inverse_sqrt
    falls as √(warmup / step) and not below ``min_ratio · peak``; constant stays.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    if shape == "inverse_sqrt":
        timescale = warmup_steps or _TIMESCALE
        return peak * max(min_ratio, math.sqrt(timescale / (step - warmup_steps + timescale)))
    if shape == "wsd":
        decay_steps = max(1, round(decay_fraction * total_steps))
        start = max(warmup_steps, total_steps - decay_steps)
        if step < start:
            return peak
        return peak * _fall((step - start + 1) / (total_steps - start + 1), decay_shape, min_ratio)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * _fall(progress, shape, min_ratio)


def _fall(progress: float, shape: str, min_ratio: float) -> float:
    """From 1 at progress 0 to ``min_ratio`` at progress 1."""
    if shape == "linear":
        left = 1.0 - progress
    elif shape == "sqrt":
        left = 1.0 - math.sqrt(progress)
    else:
        assert shape == "cosine", shape
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_ratio + (1.0 - min_ratio) * left
