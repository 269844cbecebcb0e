"""One process of benchmarks/parallel.py: worker.py JOB.json; what it finds is in RANK.json beside the job."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from spread.parts import PARTS

from hearth.training.heap import kept_heap


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    if job["cores"]:
        os.sched_setaffinity(0, {job["cores"][rank]})
    with kept_heap(torch.device("cpu")):
        found = PARTS[job["part"]](job)
    Path(sys.argv[1]).with_name(f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
