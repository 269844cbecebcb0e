"""How many processes share what, and which of them a rank is. Pure arithmetic; no torch.

Ranks count through the dimensions in the order of `DIMENSIONS`, the last one quickest: processes that talk
most (tensor) are neighbours and land on one node, those that talk least (pipeline) are farthest apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError

DIMENSIONS = ("pipeline", "data", "shard", "context", "tensor")


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups. ``expert`` is no dimension of its own: it is taken from data and shard."""

    data: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    @classmethod
    def of(cls, section: ParallelSection, world_size: int) -> Layout:
        """The layout that a recipe asks for, over ``world_size`` processes.

        Raises ConfigError when the sizes do not multiply to the number of processes, or experts do not fit.
        """
        fixed = section.shard * section.tensor * section.pipeline * section.context
        data = section.data
        if data == "auto":
            if world_size % fixed:
                raise ConfigError(
                    f"{world_size} processes cannot be laid out: shard {section.shard} x tensor "
                    f"{section.tensor} x pipeline {section.pipeline} x context {section.context} = {fixed} "
                    f"does not divide them",
                    fix=f"start a multiple of {fixed} processes, or change the section parallel",
                )
            data = world_size // fixed
        layout = cls(data, section.shard, section.tensor, section.pipeline, section.context, section.expert)
        if layout.world_size != world_size:
            raise ConfigError(
                f"parallel asks for {layout} = {layout.world_size} processes, but there are {world_size}",
                fix=f"start {layout.world_size} processes, or set parallel.data: auto",
            )
        if (layout.data * layout.shard) % layout.expert:
            raise ConfigError(
                f"parallel.expert {layout.expert} does not divide data x shard = "
                f"{layout.data * layout.shard}",
                fix="experts are spread over the processes of data and shard",
            )
        return layout

    def __str__(self) -> str:
        return " x ".join(f"{name} {getattr(self, name)}" for name in DIMENSIONS)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of `DIMENSIONS`."""
        return tuple(getattr(self, name) for name in DIMENSIONS)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return math.prod(self.sizes)

    @property
    def spreads_weights(self) -> bool:
        """Whether no process needs all weights between the steps."""
        return max(self.shard, self.tensor, self.pipeline, self.expert) > 1

    @property
    def batch_ranks(self) -> int:
        """Processes that train on different rows of a step."""
        return self.data * self.shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands in each dimension."""
        assert 0 <= rank < self.world_size, rank
        found = {}
        for name, size in zip(reversed(DIMENSIONS), reversed(self.sizes), strict=True):
            rank, found[name] = divmod(rank, size)
        return found

    def batch_rank(self, rank: int) -> int:
        """Which share of the rows of a step a rank trains on."""
        at = self.coordinates(rank)
        return at["data"] * self.shard + at["shard"]
