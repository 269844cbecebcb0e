"""Adding up the losses of micro-batches: every sum is divided by the count of the whole step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hearth.errors import TrainingError
from hearth.parallel.world import World
from hearth.training.objectives import Losses


def add_up(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum of counts by unit."""
    total: dict[str, float] = {}
    for each in counts:
        for unit, count in each.items():
            total[unit] = total.get(unit, 0.0) + count
    return total


def as_losses(found: Losses | tuple[Tensor, float]) -> Losses:
    """What a ``compute_loss`` returned; a pair is a sum over tokens and their number."""
    return found if isinstance(found, Losses) else Losses.of_tokens(found[0], found[1])


class LossTotals:
    """The losses of the micro-batches so far."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._metrics: dict[str, list[Tensor | float]] = {}

    @property
    def any(self) -> bool:
        """Whether anything was counted."""
        return bool(any(self._counts.values()))

    def add(self, losses: Losses, expected: Mapping[str, float] | None = None) -> Tensor:
        """Count a micro-batch in; its part of the loss of a step whose counts are ``expected``."""
        part = torch.zeros((), device=self._device)
        for unit, loss in losses.sums.items():
            part = part + loss / max(1.0, (expected or {}).get(unit, 1.0))
            before = self._sums.get(unit, torch.zeros((), dtype=torch.float64, device=self._device))
            self._sums[unit] = before + loss.detach().double()
            self._counts[unit] = self._counts.get(unit, 0.0) + float(losses.counts[unit])
        for name, (value, count) in losses.metrics.items():
            total = self._metrics.setdefault(name, [0.0, 0.0])
            total[0] = total[0] + (value.detach().double() if isinstance(value, Tensor) else value)
            total[1] = total[1] + count
        return part

    def take(self, other: LossTotals) -> None:
        """Add what another has counted."""
        for unit, total in other._sums.items():
            own = self._sums.get(unit, torch.zeros((), dtype=torch.float64, device=self._device))
            self._sums[unit] = own + total.to(self._device)
            self._counts[unit] = self._counts.get(unit, 0.0) + other._counts[unit]
        for name, (value, count) in other._metrics.items():
            before = self._metrics.get(name, [0.0, 0.0])
            self._metrics[name] = [before[0] + value, before[1] + count]

    def reduce(self, world: World) -> None:
        """Add up over the processes that had other rows. All have the same units and metrics."""
        if world.size == 1:
            return
        units, names = sorted(self._sums), sorted(self._metrics)
        values = [self._sums[unit] for unit in units] + [self._counts[unit] for unit in units]
        for name in names:
            values += self._metrics[name]
        if not values:
            return
        stacked = torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self._device) for value in values]
        )
        reduced = list(world.sum_over_batch(stacked))
        self._sums = dict(zip(units, reduced, strict=False))
        self._counts = {unit: float(n) for unit, n in zip(units, reduced[len(units) :], strict=False)}
        pairs = reduced[2 * len(units) :]
        self._metrics = {
            name: [total, float(count)]
            for name, total, count in zip(names, pairs[::2], pairs[1::2], strict=True)
        }

    def correction(self, expected: Mapping[str, float]) -> float:
        """Factor for gradients that were divided too early: a loss of the user's own may count differently.

        Raises TrainingError where several sums are counted differently, which no one factor corrects.
        """
        wrong = {u: n for u, n in self._counts.items() if n != expected.get(u, 0.0)}
        if not wrong:
            return 1.0
        (unit, *others) = self._sums
        if others or unit not in expected:
            raise TrainingError(
                f"the loss counts {wrong}, its batches {dict(expected)}",
                fix="let the objective's `counts` and the counts of its `loss` agree",
            )
        return max(1.0, expected[unit]) / max(1.0, self._counts[unit])

    def mean(self) -> Tensor:
        """The loss: every sum over its own count, added up."""
        parts = [loss / max(1.0, self._counts[unit]) for unit, loss in self._sums.items()]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)

    def metric_means(self) -> dict[str, float]:
        """Every metric over what it was summed over; what counted nothing is left out."""
        means = {
            name: torch.as_tensor(total / count, dtype=torch.float64, device=self._device)
            for name, (total, count) in self._metrics.items()
            if count
        }
        # One transfer for all: each would make the host wait for the device.
        return dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True)) if means else {}
