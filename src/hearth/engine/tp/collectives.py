"""What ranks compute together, on a process group of their own: the application may use the default one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# A rank that lets the others wait this long in a layer is stuck: they all compute the same. Loading is waited
# for elsewhere, without a limit.
STUCK_SECONDS = 60.0
_dist: Any = dist  # its stubs leave out what follows
_HOST = "127.0.0.1"


def open_store(port: int | None = None) -> Any:
    """The place where ranks of this machine find each other: rank 0 opens one on any free ``port``."""
    return _dist.TCPStore(_HOST, port or 0, None, port is None, wait_for_workers=False)


class Collectives:
    """Sums and gathers over all ranks; every rank must call the same ones in the same order."""

    def __init__(self, store: Any, rank: int, num_ranks: int, device: torch.device) -> None:
        """Returns when all ranks are here; raises RuntimeError after `STUCK_SECONDS`."""
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        timeout = timedelta(seconds=STUCK_SECONDS)
        self._group: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, num_ranks, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, num_ranks, timeout)

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' ``x``; overwrites it."""
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' ``x``, one after the other in the last dimension."""
        parts = [torch.empty_like(x) for _ in range(self.num_ranks)]
        self._group.allgather([parts], [x.contiguous()]).wait()
        return torch.cat(parts, dim=-1)

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        values = torch.tensor([value], device=self.device)
        options = dist.AllreduceOptions()
        options.reduceOp = _dist.ReduceOp.MIN
        self._group.allreduce([values], options).wait()
        return int(values)
