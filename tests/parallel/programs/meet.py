"""One process that meets the others, and perhaps waits for a file before it leaves.

RANK=… WORLD_SIZE=… meet.py TIMEOUT [FILE]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from hearth.config.parallel import ParallelSection
from hearth.errors import HearthError
from hearth.parallel.world import joined


def main() -> int:
    began = time.monotonic()
    try:
        with joined(ParallelSection(timeout=float(sys.argv[1])), torch.device("cpu")) as world:
            os.write(1, f"MET {len(world.gather(world.rank))}\n".encode())
            while len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
                time.sleep(0.05)
            world.gather("bye")
    except HearthError as error:
        os.write(1, f"{type(error).__name__} after {time.monotonic() - began:.1f} s: {error}\n".encode())
        return error.exit_code
    return 0


if __name__ == "__main__":
    os._exit(main())
