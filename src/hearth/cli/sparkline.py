"""A series in one line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """Draw ``values`` in at most ``width`` characters, each the mean of its share; ! is not finite."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    points = [_mean(values[start:stop]) for start, stop in itertools.pairwise(edges)]
    finite = [point for point in points if math.isfinite(point)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high / 2 - low / 2  # halves: the difference of two huge numbers is not finite
    return "".join(_bar((point / 2 - low / 2) / span if span else point - point) for point in points)


def _bar(share: float) -> str:
    return _BARS[round(share * (len(_BARS) - 1))] if math.isfinite(share) else "!"


def _mean(values: Sequence[float]) -> float:
    return sum(value / len(values) for value in values) if all(map(math.isfinite, values)) else math.nan
