"""Loss scaling for float16, whose gradients would vanish (Micikevicius et al. 2018, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hearth.training.clipping import scale as multiply

_START = 2.0**16
_LARGEST = 2.0**24
_GROWTH_EVERY = 2000


class LossScaler:
    """Multiplies the loss; halves the factor after an overflow, doubles it after 2000 steps without one.

    A step whose gradients overflow is skipped: its rows and its place in the schedule are used up, the
    optimizer and what it counts are not touched. Both are functions of the step alone, so they stay together.
    """

    def __init__(self, start: float = _START, growth_every: int = _GROWTH_EVERY) -> None:
        self.factor = start
        self.num_good_steps = 0
        self._growth_every = growth_every

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients in place by the factor. It is a power of two, so that nothing is rounded."""
        multiply(gradients, 1.0 / self.factor)

    def may_skip(self) -> bool:
        """Whether an overflow can be the factor's doing: at 1 it is the model's own."""
        return self.factor > 1.0

    def update(self, *, overflowed: bool) -> None:
        """Learn from a step whose gradients were finite or not."""
        if overflowed:
            self.factor, self.num_good_steps = max(1.0, self.factor / 2), 0
            return
        self.num_good_steps += 1
        if self.num_good_steps >= self._growth_every:
            self.factor, self.num_good_steps = min(_LARGEST, self.factor * 2), 0

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {
            "factor": torch.tensor(self.factor, dtype=torch.float64),
            "num_good_steps": torch.tensor(self.num_good_steps),
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of ``state_tensors``."""
        self.factor = float(tensors["factor"])
        self.num_good_steps = int(tensors["num_good_steps"])
