"""Training on two processes: every layout beside torch's own DDP, the pipeline's bubble, sharded checkpoints.

    python benchmarks/parallel.py                       # everything: 12 minutes on 2 cores
    python benchmarks/parallel.py --only scaling --rounds 5
    python benchmarks/parallel.py --quick               # a tiny model: a smoke test of a minute

One thread and one core for each process, gloo between them. PARTS are of

* scaling: tokens/s of one process and of two in every layout, beside a loop in plain torch with DDP: the same
  weights, rows, micro-batches, precision and AdamW. They take turns, and who goes first changes from round
  to round; a rate is that of the median step of all rounds. Two processes share the rows that one has.
* overhead: the same step by our trainer under ddp and by plain DDP, in turns within one process; the median
  of the ratios, and their quartiles. What is left over plain DDP around our loss is the loop.
* bubble: the share of a pipeline's step in which a process is within no pass of a stage, forward or backward,
  beside the formula for passes of equal length. Stages are not equal (the last one has the output layer), and
  the threads that send share the cores: the process with more to do is the one to compare.
* checkpoint: sharded state of two processes, saved and loaded by Hearth (hashed, flushed, verified) and by
  torch's DCP, and as many bytes of noise by one and two processes that only write, flush and read; files are
  taken out of the system's memory before they are read.
* gpu: where there is one, FSDP2 with compiled layers on it beside the same loop without FSDP2.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from typing import Any

from common import hardware, names_of, summary, write_result
from spread import tables
from spread.launch import WorkersFailed, measure

PARTS = ("scaling", "overhead", "bubble", "checkpoint", "gpu")
# A shape, steps of each measurement, and how many rounds at most.
SCALING: list[tuple[dict[str, Any], int, int]] = [
    ({"size": "5M", "length": 256, "batch": 16, "micro": 2}, 2, 9),
    ({"size": "20M", "length": 256, "batch": 8, "micro": 1}, 2, 2),
]
OVERHEAD: list[tuple[dict[str, Any], int]] = [
    ({"size": "5M", "length": 256, "batch": 16, "micro": 2}, 6),
    ({"size": "20M", "length": 256, "batch": 8, "micro": 1}, 2),
]
BUBBLE: dict[str, Any] = {"size": "20M", "length": 256, "batch": 2, "micro": 1}
CHECKPOINT: dict[str, Any] = {"size": "30M", "length": 64, "batch": 2, "micro": 1}
GPU: dict[str, Any] = {"size": "500M", "length": 2048, "batch": 8, "micro": 8}
TINY: dict[str, Any] = {"size": "tiny", "length": 64, "batch": 8, "micro": 2}
NUMBERS = (2, 4, 8, 16)
SCHEDULES = ("1f1b", "interleaved", "zero_bubble")


class Benchmark:
    """One run: what was asked for, and what was found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.quick: bool = arguments.quick
        self.rounds: int = 1 if self.quick else arguments.rounds
        self.only: list[str] = arguments.only
        self.names: list[str] = arguments.layouts
        self.machine = hardware()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        # With fewer than two the processes would be pinned to the same one.
        self.cores = [] if arguments.no_pin or len(cores) < 2 else cores
        self.common = {"precision": arguments.precision, "cores": self.cores}
        self.settings = {"rounds": self.rounds, **self.common}
        self.found: dict[str, Any] = {}
        self.notes: list[str] = []

    def run(self) -> None:
        """All parts that were asked for; one that fails is noted, and the others go on."""
        for part in self.only:
            started = time.perf_counter()
            try:
                getattr(self, part)()
            except WorkersFailed as error:
                self.notes.append(str(error))
                print(error, file=sys.stderr)
            print(f"{part}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    def scaling(self) -> None:
        """A table for each size."""
        for shape, steps, most in [(TINY, 2, 1)] if self.quick else SCALING:
            rounds = min(self.rounds, most)
            job = {**self.common, "shape": shape, "steps": steps, "rounds": rounds, "names": self.names}
            facts = measure("scaling", 2, job)[0]
            seconds = {
                name: [one for round_ in rounds for one in round_]
                for name, rounds in facts["seconds"].items()
            }
            self.found.setdefault("scaling", {})[shape["size"]] = {
                "tokens of a step": shape["batch"] * shape["length"],
                "parameters": facts["parameters"],
                "seconds": seconds,
                "losses": facts["losses"],
            }

    def overhead(self) -> None:
        """Of our trainer over plain DDP."""
        for shape, steps in [(TINY, 3)] if self.quick else OVERHEAD:
            job = {**self.common, "shape": shape, "steps": steps * (1 if self.quick else self.rounds)}
            self.found.setdefault("overhead", {})[shape["size"]] = measure("overhead", 2, job)[0]["seconds"]

    def bubble(self) -> None:
        """Idle shares of both processes."""
        numbers = NUMBERS[:2] if self.quick else NUMBERS
        shape = {**TINY, "micro": 1} if self.quick else BUBBLE
        job = {
            **self.common,
            "shape": shape,
            "rounds": min(self.rounds, 2),
            "numbers": numbers,
            "schedules": SCHEDULES,
        }
        ranks = [facts["passes"] for facts in measure("bubble", 2, job)]
        self.found["bubble"] = tables.idle_shares(ranks)

    def checkpoint(self) -> None:
        """Seconds, and the bytes they are of."""
        shape = TINY if self.quick else CHECKPOINT
        with tempfile.TemporaryDirectory() as scratch:
            job = {**self.common, "shape": shape, "rounds": self.rounds, "scratch": scratch}
            self.found["checkpoint"] = measure("checkpoint", 2, job)[0]

    def gpu(self) -> None:
        """On a GPU, or not at all."""
        import torch

        if not torch.cuda.is_available():
            self.found["gpu"] = {}
            return
        job = {
            **self.common,
            "cores": [],
            "device": "cuda",
            "shape": TINY if self.quick else GPU,
            "steps": 10,
        }
        self.found["gpu"] = measure("gpu", 1, job)[0]

    def results(self) -> dict[str, Any]:
        """For the file: what was found, with summaries of all measurements."""
        return {**self.found, "summaries": _summaries(self.found), "notes": self.notes}


def _summaries(found: dict[str, Any]) -> dict[str, Any]:
    rates = {
        size: {
            name: summary([facts["tokens of a step"] / each for each in values])
            for name, values in facts["seconds"].items()
            if values
        }
        for size, facts in found.get("scaling", {}).items()
    }
    shares = {
        size: {over: summary(tables.overheads(seconds, over)) for over in ("plain", "bare")}
        for size, seconds in found.get("overhead", {}).items()
    }
    mib = found["checkpoint"]["bytes"] / 2**20 if "checkpoint" in found else 0.0
    speeds = {
        name: mib / statistics.median(values)
        for name, values in found.get("checkpoint", {}).get("seconds", {}).items()
    }
    return {"tokens/s": rates, "overhead %": shares, "checkpoint MiB/s": speeds}


def main() -> None:
    """Run the parts that were asked for; print tables, write JSON."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument(
        "--only", type=names_of(PARTS), default=list(PARTS), metavar="PARTS", help="comma-separated"
    )
    parser.add_argument(
        "--layouts",
        type=names_of(tables.NAMES),
        default=list(tables.NAMES),
        metavar="NAMES",
        help=f"of scaling; comma-separated names of: {', '.join(tables.NAMES)}",
    )
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each competitor")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--no-pin", action="store_true", help="let the system choose the cores")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    # A plain end would leave the workers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    benchmark = Benchmark(arguments)
    benchmark.run()
    stored = write_result(
        "parallel-quick" if benchmark.quick else "parallel",
        benchmark.results(),
        settings=benchmark.settings,
        machine=benchmark.machine,
    )
    if arguments.json:
        print(json.dumps(benchmark.results()))
    else:
        print(f"\n{benchmark.machine['cpu']}, {benchmark.machine['num_cores']} cores\n")
        print("\n\n".join([*tables.all_tables(benchmark.found), *benchmark.notes]))
        print(f"\nwritten to {os.path.relpath(stored)}")
    if benchmark.notes:
        sys.exit(1)


if __name__ == "__main__":
    main()
