"""One process that meets the others twice; when it is rank 1 of the first start, it dies then.

torchrun --max-restarts 1 again.py
"""

from __future__ import annotations

import os

import torch

from hearth.config.parallel import ParallelSection
from hearth.parallel.world import joined


def main() -> None:
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    for time in ("first", "second"):
        with joined(ParallelSection(timeout=20), torch.device("cpu")) as world:
            num = len(world.gather(None))
            os.write(1, f"start {start}: rank {world.rank} met {num}, {time} time\n".encode())
            if (start, time, world.rank) == ("0", "second", 1):
                os._exit(1)
            world.gather("bye")


if __name__ == "__main__":
    main()
