"""How long processes talk: the alpha-beta model (Hockney 1994; Thakur et al. 2005) over rings.

A collective over n processes takes its number of steps times a latency (alpha) plus its bytes over a
bandwidth (beta). all-gather and reduce-scatter send (n - 1) / n of the whole from each process, all-reduce
twice that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hearth.parallel.layout import DIMENSIONS, Layout
from hearth.parallel.planner.hardware import LINK_EFFICIENCY, Cluster

Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]
_VOLUME = {"all_gather": 1.0, "reduce_scatter": 1.0, "all_reduce": 2.0, "all_to_all": 1.0}


@dataclass(frozen=True)
class Group:
    """Processes that talk: how many, and the distance in ranks from one to the next."""

    size: int
    stride: int = 1

    @classmethod
    def of(cls, layout: Layout, *names: str) -> Group:
        """The group of one dimension, or of neighbouring ones together, in the order of ranks."""
        inner = max(DIMENSIONS.index(name) for name in names)
        stride = 1
        for name in DIMENSIONS[inner + 1 :]:
            stride *= getattr(layout, name)
        size = 1
        for name in names:
            size *= getattr(layout, name)
        return cls(size, stride)

    def nodes(self, cluster: Cluster) -> int:
        """How many nodes it reaches over."""
        return max(1, -(-self.size * self.stride // cluster.per_node))

    def bandwidth(self, cluster: Cluster) -> float:
        """Bytes a second in one direction for each process.

        Within a node that of its wire. Over nodes a ring enters and leaves each node once, over the wires of
        all members there together.
        """
        if self.nodes(cluster) == 1:
            return LINK_EFFICIENCY * cluster.inside.bandwidth
        members = max(1, cluster.per_node // self.stride)
        if members == 1:
            return LINK_EFFICIENCY * cluster.between.bandwidth
        return LINK_EFFICIENCY * min(cluster.inside.bandwidth, cluster.between.bandwidth * members)

    def latency(self, cluster: Cluster) -> float:
        """Seconds of one way round the ring but for the last step."""
        nodes = self.nodes(cluster)
        hops = min(nodes, self.size) - 1
        return hops * cluster.between.latency + (self.size - 1 - hops) * cluster.inside.latency


def collective_seconds(operation: Operation, num_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds of one collective. ``num_bytes``: of the whole tensor; for all_to_all what a process sends."""
    if group.size == 1 or num_bytes == 0:
        return 0.0
    if operation == "send":
        link = cluster.inside if group.nodes(cluster) == 1 else cluster.between
        return link.latency + num_bytes / (LINK_EFFICIENCY * link.bandwidth)
    share = (group.size - 1) / group.size
    if operation == "all_to_all":
        # Every pair has a wire of its own: what leaves the node goes over the one wire of this device.
        nodes = group.nodes(cluster)
        away = share if nodes == 1 else (nodes - 1) / nodes
        link = cluster.inside if nodes == 1 else cluster.between
        return group.latency(cluster) + away * num_bytes / (LINK_EFFICIENCY * link.bandwidth)
    rounds = _VOLUME[operation]
    seconds = rounds * share * num_bytes / group.bandwidth(cluster)
    return rounds * group.latency(cluster) + seconds
