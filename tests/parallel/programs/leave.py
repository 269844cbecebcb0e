"""One process that ends as soon as it has heard of the others, while their answers are still being put away.

RANK=… WORLD_SIZE=… leave.py
"""

from __future__ import annotations

import sys

import torch

from hearth.config.parallel import ParallelSection
from hearth.parallel.world import joined

kept = []  # as torch's own tables of meshes keep groups, whose destructors then do not wait for threads


def main() -> None:
    sys.setswitchinterval(60)  # other threads get the interpreter where this one waits, and nowhere else
    with joined(ParallelSection(timeout=20), torch.device("cpu")) as world:
        kept.append(world)
        for _ in range(3):
            world.gather("bye")


if __name__ == "__main__":
    main()
