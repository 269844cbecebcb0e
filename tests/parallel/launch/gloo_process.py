"""A process of a real process group; rank 1 dies once, after all have met."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hearth.parallel.launch.start import prepare
from hearth.parallel.meeting import leave

prepare(os.environ)
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
once = Path(os.environ["HEARTH_JOB_DIR"]) / "died"
if dist.get_rank() == 1 and not once.exists():
    once.touch()
    os._exit(1)
dist.all_reduce(total)
# In one piece: both write to one pipe, and unbuffered printing sends the end of a line by itself.
sys.stdout.write(f"rank {dist.get_rank()} counts {total.item():g}\n")
sys.stdout.flush()
leave()
