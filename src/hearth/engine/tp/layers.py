"""The linear layers of one rank, and the sums and gathers that join the ranks.

Legend: n ranks, T tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from hearth.engine.tp.collectives import Collectives


class RowParallel(nn.Module):
    """Input features divided: each rank computes a part of every output, and the parts are added."""

    def __init__(
        self, inner: nn.Linear, bias: torch.Tensor | None, group: Collectives, *, splits_input: bool
    ) -> None:
        """``inner`` has no bias, which would be added once a rank. ``splits_input``: the input is whole."""
        super().__init__()
        self.inner = inner
        self.bias = bias
        self.group = group
        self.splits_input = splits_input
        self.in_features = inner.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.splits_input:
            x = x.narrow(-1, self.group.rank * self.in_features, self.in_features)
        out: torch.Tensor = self.group.add(self.inner(x))
        return out if self.bias is None else out + self.bias


class GatheredColumns(nn.Module):
    """Output features divided, and put together again at once: what follows needs them all."""

    def __init__(self, inner: nn.Linear, group: Collectives) -> None:
        super().__init__()
        self.inner = inner
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.group.gather(self.inner(x))
