"""From the facts of single runs to figures and tables: pure arithmetic."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 2**20


def tokens_per_second(stamps: Sequence[float], tokens: Sequence[int]) -> float:
    """Median over the steps but the first, which warms up. ``stamps``: when each step was done."""
    seconds = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    return statistics.median(count / each for count, each in zip(tokens[1:], seconds, strict=True))


def overhead_share(pairs: Sequence[Sequence[float]]) -> float:
    """What the loop adds, as a share of its step; pairs of seconds (step of the loop, bare step).

    The median over the pairs but the first: what slows the machine for a moment hits one of them.
    """
    used = pairs[1:] if len(pairs) > 1 else pairs
    return statistics.median((whole - bare) / whole for whole, bare in used)


def largest_difference(losses: Mapping[str, Sequence[float]], *, ours: str) -> float:
    """Of all losses of the others from ours at the same step, as a share of ours."""
    found = [
        abs(other - own) / abs(own)
        for name, values in losses.items()
        if name != ours
        for own, other in zip(losses[ours], values, strict=True)
    ]
    return max(found, default=0.0)


def loss_table(losses: Mapping[str, Sequence[float]]) -> str:
    """A line a step, a column a competitor."""
    lines = [f"| loss per token, step | {' | '.join(losses)} |", "|---" * (len(losses) + 1) + "|"]
    for step, values in enumerate(zip(*losses.values(), strict=True), 1):
        lines.append(f"| {step} | {' | '.join(f'{value:.4f}' for value in values)} |")
    return "\n".join(lines)


def memory(facts: Mapping[str, Any]) -> dict[str, float]:
    """MiB: the most there was, and how much of it training added to what was there before."""
    peak, start = facts["peak_memory"], facts["memory_at_start"]
    return {"peak": peak / MIB, "added": (peak - start) / MIB}


@dataclass(frozen=True)
class Goal:
    """A ratio that should be at least, or at most, a number. ``value`` is None where it was not measured."""

    text: str
    value: float | None
    least: float | None = None
    most: float | None = None

    @property
    def reached(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.least if self.least is not None else self.value <= (self.most or 0.0)


def goal_table(goals: Sequence[Goal]) -> str:
    """What was hoped for, what was found; goals without a figure are left out."""
    lines = ["| goal | wanted | found | |", "|---|---|---|---|"]
    for goal in goals:
        if goal.value is None:
            continue
        wanted = f">= {goal.least:g}" if goal.least is not None else f"<= {goal.most:g}"
        lines.append(
            f"| {goal.text} | {wanted} | {goal.value:.3f} | {'reached' if goal.reached else 'missed'} |"
        )
    return "\n".join(lines)
