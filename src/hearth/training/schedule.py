"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def learning_rate_at(
    step: int,
    *,
    total_steps: int,
    peak: float,
    shape: str = "cosine",
    warmup_steps: int = 0,
    min_ratio: float = 0.1,
    decay_fraction: float = 0.2,
) -> float:
    """Learning rate of optimizer step ``step`` (0 ≤ step < total_steps).

    Linear warmup reaches ``peak`` at step ``warmup_steps - 1`` (the first step is not wasted at zero). Then:
    cosine and linear fall to ``min_ratio · peak``; wsd stays at the peak and falls linearly over the last
    ``decay_fraction`` of all steps; constant stays.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    if shape == "wsd":
        decay_steps = max(1, round(decay_fraction * total_steps))
        start = max(warmup_steps, total_steps - decay_steps)
        if step < start:
            return peak
        progress = (step - start + 1) / (total_steps - start + 1)
        return peak * (1.0 - (1.0 - min_ratio) * progress)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if shape == "linear":
        return peak * (1.0 - (1.0 - min_ratio) * progress)
    assert shape == "cosine", shape
    return peak * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
