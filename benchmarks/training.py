"""Training: Hearth beside TRL's SFTTrainer, transformers' Trainer and a loop in plain torch.

    python benchmarks/peers/install.py trl transformers   # once: an environment for each peer; minutes
    python benchmarks/training.py                         # everything, two rounds: 15 minutes on 2 cores
    python benchmarks/training.py --only sft --rounds 3
    python benchmarks/training.py --quick                 # a tiny model, no TRL: a smoke test of a minute

The same weights, documents of each step, precision (bf16 where the processor has it) and AdamW for all;
losses are printed side by side. A measurement is a process of its own, they take turns, and who goes first
changes from round to round. Tokens are those that are not padding; a rate is the median over the steps but
the first. PARTS are of sft (gsm8k), pretrain (Python's standard library), memory (32,768 entries in the
vocabulary), overhead (each step of the loop beside the same step bare, in one process) and checkpoint (how
long a step waits for one).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import hardware, names_of, ratio_table, summary, write_result
from trainers import figures, jobs
from trainers.competitors import TrainerFailed, interpreter, measure, missing
from trainers.jobs import Shape

PARTS = ("sft", "pretrain", "memory", "overhead", "checkpoint")
PEER_NAMES = ("transformers", "torch", "trl-default", "trl-padding", "trl-packing")
PEERS_OF = {
    "sft": ("torch", "trl-default", "trl-padding", "trl-packing"),
    "pretrain": ("transformers", "torch"),
    "memory": ("transformers", "torch"),
    "overhead": (),
    "checkpoint": ("transformers",),
}
SHAPES = {
    "sft": [Shape("sft", "5M", steps=7)],
    "pretrain": [Shape("pretrain", "5M", steps=7), Shape("pretrain", "20M", steps=5)],
    "memory": [Shape("pretrain", "20M", steps=3, batch_size=8, vocab=32768)],
    "overhead": [Shape("pretrain", "5M", steps=9), Shape("pretrain", "20M", steps=5)],
    "checkpoint": [Shape("pretrain", "20M", steps=7, batch_size=8, checkpoint_every=3)],
}
_SMALL: dict[str, Any] = {"length": 128, "micro_batch_size": 2, "batch_size": 4, "vocab": 512}
QUICK = {
    "sft": [Shape("sft", "300K", steps=3, **_SMALL | {"length": 512})],
    "pretrain": [Shape("pretrain", "300K", steps=3, **_SMALL)],
    "memory": [Shape("pretrain", "1M", steps=3, **_SMALL | {"vocab": 8192})],
    "overhead": [Shape("pretrain", "300K", steps=4, **_SMALL)],
    "checkpoint": [Shape("pretrain", "300K", steps=5, checkpoint_every=2, **_SMALL)],
}


class Benchmark:
    """One run: what was asked for, and what was found."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        import torch

        from hearth.models import peak_flops
        from hearth.training.precision import choose_device, choose_precision

        self.quick: bool = arguments.quick
        self.rounds: int = 1 if self.quick else arguments.rounds
        self.only: list[str] = arguments.only
        everybody = ("transformers", "torch") if self.quick else PEER_NAMES
        self.peers: list[str] = list(everybody) if arguments.peers is None else arguments.peers
        self.folder = folder
        self.machine = hardware()
        device = choose_device()
        self.device, self.precision = device.type, choose_precision(arguments.precision, device)
        self.peak = peak_flops(device, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        self.settings = {"rounds": self.rounds, "precision": self.precision, "device": self.device}
        self.notes: list[str] = []
        self.runs: dict[str, dict[str, list[dict[str, Any]]]] = {}  # by label of the job and competitor
        self.prepared: dict[str, jobs.Prepared] = {}
        self._datasets: dict[str, Any] = {}

    # -- what --------------------------------------------------------------------------------------------
    def run(self) -> None:
        for part in self.only:
            if part == "sft" and not jobs.GSM8K.exists():
                self.note(jobs.NO_GSM8K)
                continue
            for shape in (QUICK if self.quick else SHAPES)[part]:
                self.measure_part(part, shape)

    def measure_part(self, part: str, shape: Shape) -> None:
        label = f"{part}, {shape.size}" + (f", {shape.vocab} entries" if part == "memory" else "")
        self.prepared[label] = jobs.write_job(
            self.folder / label.replace(", ", "-"),
            shape,
            self.dataset(shape.objective),
            precision=self.precision,
            device=self.device,
        )
        first = "overhead" if part == "overhead" else "hearth"
        names = [first, *(name for name in PEERS_OF[part] if name in self.peers)]
        for name in [name for name in names if interpreter(name) is None]:
            self.note(missing(name))
            names.remove(name)
        self.runs[label] = {name: [] for name in names}
        # Memory and shares of a step hardly differ from run to run.
        for round_ in range(self.rounds if part in ("sft", "pretrain") else 1):
            for name in names if round_ % 2 == 0 else reversed(names):
                self.measure_one(label, name, round_)

    def measure_one(self, label: str, name: str, round_: int) -> None:
        try:
            facts = measure(name, self.prepared[label].folder)
        except TrainerFailed as error:
            self.note(str(error))
            return
        self.runs[label][name].append(facts)
        rate = figures.tokens_per_second(facts["stamps"], self.prepared[label].tokens)
        memory = figures.memory(facts)
        print(
            f"{label}, round {round_ + 1}, {name}: {rate:.0f} tokens/s, last loss {facts['losses'][-1]:.4f}, "
            f"{memory['peak']:.0f} MiB",
            file=sys.stderr,
            flush=True,
        )

    def dataset(self, objective: str) -> Any:
        if objective not in self._datasets:
            folder = self.folder / objective
            folder.mkdir()
            self._datasets[objective] = (
                jobs.prepare_gsm8k(folder, num_lines=200 if self.quick else None)
                if objective == "sft"
                else jobs.prepare_text(folder, num_files=8 if self.quick else None)
            )
        return self._datasets[objective]

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            print(text, file=sys.stderr, flush=True)

    # -- figures -----------------------------------------------------------------------------------------
    def rates(self, label: str, name: str) -> list[float]:
        tokens = self.prepared[label].tokens
        return [
            figures.tokens_per_second(facts["stamps"], tokens) for facts in self.runs[label].get(name, [])
        ]

    def mfu(self, label: str, name: str) -> list[float]:
        """Percent of the measured peak."""
        each = 100 * self.prepared[label].flops_per_token / self.peak
        return [rate * each for rate in self.rates(label, name)]

    def memories(self, label: str, name: str, what: str) -> list[float]:
        return [figures.memory(facts)[what] for facts in self.runs[label].get(name, [])]

    def rows(
        self, parts: tuple[str, ...], figure: Any, suffix: str = ""
    ) -> dict[str, dict[str, list[float]]]:
        """A line a job of these parts, a column a competitor."""
        labels = [label for label in self.runs if label.split(",")[0] in parts]
        found = {label + suffix: {name: figure(label, name) for name in self.runs[label]} for label in labels}
        return {label: row for label, row in found.items() if any(row.values())}

    def losses(self, label: str) -> dict[str, list[float]]:
        return {name: runs[0]["losses"] for name, runs in self.runs[label].items() if runs}

    def overheads(self) -> dict[str, dict[str, float]]:
        """Shares of a step, in percent."""
        found = {}
        for label, by_name in self.runs.items():
            for facts in by_name.get("overhead", []):
                shares = facts["performance"]["shares"]
                found[label] = {
                    "beside a bare step": 100 * figures.overhead_share(facts["pairs"]),
                    "by the clock of the loop": 100 * (shares["data"] + shares["other"]),
                }
        return found

    def saves(self) -> dict[str, dict[str, dict[str, float]]]:
        """Milliseconds: until a checkpoint is on the disk, how long a step waits for it; and a step."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for label, by_name in self.runs.items():
            for name, runs in by_name.items():
                saves = [save for facts in runs for save in facts["saves"]]
                if saves:
                    found.setdefault(label, {})[name] = {
                        key: 1000 * statistics.median(save[key] for save in saves)
                        for key in ("stall", "seconds")
                    }
        return found

    def goals(self) -> list[figures.Goal]:
        def ratio(label: str, peer: str, figure: Any) -> float | None:
            ours, theirs = (figure(label, name) if label in self.runs else [] for name in ("hearth", peer))
            return statistics.median(ours) / statistics.median(theirs) if ours and theirs else None

        goals = []
        for label in self.runs:
            part = label.split(",")[0]
            if part == "sft":
                value = ratio(label, "trl-default", self.rates)
                goals.append(figures.Goal(f"{label}: tokens/s over TRL as it comes", value, least=1.5))
            elif part == "pretrain":
                value = ratio(label, "transformers", self.rates)
                goals.append(figures.Goal(f"{label}: tokens/s over Trainer", value, least=1.1))
            elif part == "memory":
                for what in ("peak", "added"):
                    value = ratio(
                        label, "transformers", lambda job, name, what=what: self.memories(job, name, what)
                    )
                    goals.append(figures.Goal(f"{label}: memory ({what}) over Trainer", value, most=0.7))
        for label, shares in self.overheads().items():
            for how, share in shares.items():
                goals.append(figures.Goal(f"{label}: share of a step, {how}", share / 100, most=0.02))
        return goals

    # -- results -----------------------------------------------------------------------------------------
    def tables(self) -> str:
        both = ("sft", "pretrain")
        parts = []
        for unit, higher, rows in (
            ("tokens/s", True, self.rows(both, self.rates)),
            ("MFU %", True, self.rows(both, self.mfu)),
            ("MiB", False, self.memory_rows()),
        ):
            if rows:
                parts.append(ratio_table(rows, ours="hearth", unit=unit, higher_is_better=higher))
        for label in self.runs:
            losses = self.losses(label)
            if len(losses) > 1 and label.split(",")[0] in both:
                difference = figures.largest_difference(losses, ours="hearth") if "hearth" in losses else 0.0
                parts.append(
                    f"{label}: the losses differ by {difference:.2%} at most\n\n{figures.loss_table(losses)}"
                )
        for label, shares in self.overheads().items():
            parts.append(f"{label}: " + ", ".join(f"{how} {share:.2f} %" for how, share in shares.items()))
        for label, by_name in self.saves().items():
            for name, times in by_name.items():
                parts.append(
                    f"{label}, {name}: a step waits {times['stall']:.0f} ms for a checkpoint that is written "
                    f"{times['seconds']:.0f} ms after it was asked for"
                )
        goals = self.goals()
        if any(goal.value is not None for goal in goals):
            parts.append(figures.goal_table(goals))
        return "\n\n".join([*parts, *self.notes])

    def memory_rows(self) -> dict[str, dict[str, list[float]]]:
        rows: dict[str, dict[str, list[float]]] = {}
        for what, suffix in (("peak", ": peak"), ("added", ": added by training")):
            rows |= self.rows(
                ("sft", "pretrain", "memory"),
                lambda label, name, what=what: self.memories(label, name, what),
                suffix,
            )
        return rows

    def results(self) -> dict[str, Any]:
        def summaries(rows: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
            return {
                label: {name: summary(values) for name, values in row.items() if values}
                for label, row in rows.items()
            }

        return {
            "tokens/s": summaries(self.rows(("sft", "pretrain"), self.rates)),
            "MFU %": summaries(self.rows(("sft", "pretrain"), self.mfu)),
            "MiB": summaries(self.memory_rows()),
            "losses": {label: self.losses(label) for label in self.runs},
            "overhead %": self.overheads(),
            "checkpoint ms": self.saves(),
            "goals": [vars(goal) | {"reached": goal.reached} for goal in self.goals()],
            "facts": {
                "peak flops": self.peak,
                "jobs": {
                    label: {
                        "parameters": job.parameters,
                        "flops per token": job.flops_per_token,
                        "tokens of each step": job.tokens,
                    }
                    for label, job in self.prepared.items()
                },
                "versions": {
                    name: runs[0]["versions"]
                    for by in self.runs.values()
                    for name, runs in by.items()
                    if runs
                },
                "shares of Hearth's step": {
                    label: runs[0]["performance"]["shares"]
                    for label, by in self.runs.items()
                    if (runs := by.get("hearth"))
                },
            },
            "notes": self.notes,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, no TRL")
    parser.add_argument(
        "--only", type=names_of(PARTS), default=list(PARTS), metavar="PARTS", help="comma-separated"
    )
    parser.add_argument(
        "--peers",
        type=names_of(PEER_NAMES),
        help=f"none, or comma-separated names of {', '.join(PEER_NAMES)}",
    )
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each competitor")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    # A plain end would leave the worker behind, and the folder of its job.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(arguments, Path(folder))
        benchmark.run()
    stored = write_result(
        "training-quick" if benchmark.quick else "training",
        benchmark.results(),
        settings=benchmark.settings,
        machine=benchmark.machine,
    )
    if arguments.json:
        print(json.dumps(benchmark.results()))
        return
    print(f"\n{benchmark.machine['cpu']}, {benchmark.machine['num_cores']} cores, {benchmark.precision}\n")
    print(benchmark.tables())
    print(f"\nwritten to {os.path.relpath(stored)}")


if __name__ == "__main__":
    main()
