"""One process that meets the others; when it is rank 1 of the first start, it dies then.

torchrun --max-restarts 1 again.py
"""

from __future__ import annotations

import os

import torch

from hearth.config.parallel import ParallelSection
from hearth.parallel.world import joined


def main() -> None:
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    with joined(ParallelSection(timeout=20), torch.device("cpu")) as world:
        os.write(1, f"start {start}: rank {world.rank} met {len(world.gather(None))}\n".encode())
        if (start, world.rank) == ("0", 1):
            os._exit(1)
        world.gather("bye")


if __name__ == "__main__":
    main()
