"""The planner's error: what `hearth plan` predicts beside what training really takes, on this machine.

    python benchmarks/planner.py                # all configurations: 11 minutes on 2 cores
    python benchmarks/planner.py --only 0,3     # some of them, by number
    python benchmarks/planner.py --quick        # three small ones: a minute

Each configuration trains in a process of its own, or in two: optimizer steps of the real trainer on rows of
random tokens, two documents in each. *tensors* is the peak of the bytes of all tensors of a step, weights and
optimizer state included, counted at every operator (of one process: FSDP2 takes and gives back memory behind
the operators' backs); *process* is how much the process grew from before the model was built to its peak, as
the system reports it, with what kernels and the allocator keep; of two processes the fuller one. The C
library is told to give large pieces back at once (MALLOC_MMAP_THRESHOLD_, unless the environment has its
own); as it comes it keeps up to half as much again in a heap full of holes. The time of a step is the median
over the steps but the first. The rates that predict it are measured in the same processes, before training.
Two processes have a thread each, one process has ``--threads``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import hardware, write_result
from spread.launch import WorkersFailed, run_together


@dataclass(frozen=True)
class Case:
    """One configuration. ``rows`` of a step, in micro-batches of ``micro``."""

    name: str
    size: str
    vocab: int
    length: int
    rows: int
    micro: int
    optimizer: str = "adamw"
    checkpointing: str = "none"
    precision: str = "auto"
    architecture: str = "qwen3"
    ema: float = 0.0
    packed: bool = True
    experts: bool = False
    parallel: dict[str, Any] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """How many train together."""
        return math.prod(value for key, value in self.parallel.items() if key in DIMENSIONS)


DIMENSIONS = ("data", "shard", "tensor", "pipeline", "context")
CASES = [
    Case("base", "5M", 4096, 256, 8, 4),
    Case("long rows", "5M", 4096, 1024, 4, 2),
    Case("one micro-batch", "5M", 4096, 256, 8, 8),
    Case("20M", "20M", 8192, 512, 8, 4),
    Case("20M, float32", "20M", 8192, 512, 4, 2, precision="fp32"),
    Case("20M, selective", "20M", 8192, 512, 8, 4, checkpointing="selective"),
    Case("20M, full", "20M", 8192, 512, 8, 4, checkpointing="full"),
    Case("20M, adamw8bit", "20M", 8192, 256, 4, 2, optimizer="adamw8bit"),
    Case("20M, lion", "20M", 8192, 256, 4, 2, optimizer="lion"),
    Case("20M, adafactor", "20M", 8192, 256, 4, 2, optimizer="adafactor"),
    Case("20M, muon", "20M", 8192, 256, 4, 2, optimizer="muon"),
    Case("20M, average", "20M", 8192, 256, 4, 2, ema=0.99),
    Case("large vocabulary", "20M", 32768, 256, 8, 4),
    Case("llama, one document a row", "20M", 8192, 512, 8, 4, architecture="llama", packed=False),
    Case("50M, full", "50M", 16384, 512, 4, 2, checkpointing="full"),
    Case("mixture of experts", "5M", 4096, 256, 4, 2, experts=True),
    Case("ddp 2", "20M", 8192, 256, 8, 2, parallel={"data": 2}),
    Case("fsdp 2", "20M", 8192, 256, 8, 2, parallel={"shard": 2}),
    Case("zero1 2", "20M", 8192, 256, 8, 2, parallel={"shard": 2, "zero": 1}),
    Case("tensor 2", "5M", 4096, 256, 8, 4, parallel={"tensor": 2}),
    Case("pipeline 2", "20M", 8192, 256, 8, 2, parallel={"pipeline": 2}),
    Case("context 2", "20M", 8192, 512, 4, 2, parallel={"context": 2}),
]
QUICK = [
    Case("quick", "1M", 1024, 128, 4, 2),
    Case("quick, full", "1M", 1024, 128, 4, 2, checkpointing="full", optimizer="lion"),
    Case("quick, fsdp", "1M", 1024, 128, 4, 2, parallel={"shard": 2}),
]
STEPS = 4
TIMEOUT = 600.0
FIGURES = ("tensors", "process", "seconds")


def configuration(case: Case) -> Any:
    """The transformers configuration of a case."""
    from transformers import AutoConfig

    from hearth.models.sizes import config_for_size

    if not case.experts:
        config = config_for_size(case.size, case.architecture, case.vocab, case.length)
        # A pipeline takes no output layer that is the embedding.
        config.tie_word_embeddings = config.tie_word_embeddings and case.parallel.get("pipeline", 1) == 1
        return config
    return AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=case.vocab,
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=case.length,
        tie_word_embeddings=True,
    )


def recipe(case: Case) -> Any:
    """The recipe of a case."""
    from hearth.config import Recipe

    return Recipe.model_validate(
        {
            "model": {"size": case.size, "context_length": case.length},
            "data": {"sequence_length": case.length, "packing": case.packed},
            "train": {
                "steps": 1000,
                "batch_size": case.rows,
                "micro_batch_size": case.micro,
                "optimizer": case.optimizer,
                "activation_checkpointing": case.checkpointing,
                "precision": case.precision,
                "ema_decay": case.ema,
                "learning_rate": 1e-4,
            },
            "track": {"system_metrics_every": 0},
            "parallel": case.parallel,
        }
    )


def rows_of(case: Case) -> list[dict[str, Any]]:
    """Rows of random tokens, of two documents or one, whose last labels do not count."""
    import numpy as np

    random = np.random.default_rng(0)
    found = []
    for _ in range(2 * case.rows):
        ids = random.integers(0, case.vocab, case.length + 1)
        labels, positions = ids[1:].copy(), np.arange(case.length)
        segments = np.zeros(case.length, dtype=np.int64)
        labels[-1] = -100
        if case.packed:
            middle = case.length // 2
            positions[middle:] -= middle
            segments[middle:] = 1
            labels[middle - 1] = -100
        found.append(
            {"input_ids": ids[:-1], "labels": labels, "position_ids": positions, "segment_ids": segments}
        )
    return found


def resident_bytes() -> int:
    """Memory of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def measure(case: Case) -> dict[str, Any]:
    """Train, in this process and those that were started with it; what it took, and what the planner says."""
    import torch

    from hearth.models.building import model_from_config
    from hearth.parallel.world import joined
    from hearth.training import Trainer
    from hearth.training.precision import choose_precision

    config, settings = configuration(case), recipe(case)
    precision = choose_precision(case.precision, "cpu")
    with joined(settings.parallel, torch.device("cpu")) as world:
        predicted = predict(case, config, settings, precision)
        with contextlib.suppress(OSError):  # forget the peak of measuring rates
            Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes()
        model = model_from_config(config, seed=0)
        rows = rows_of(case)
        trainer = Trainer(model=model, train_dataset=rows, config=settings, world=world, progress=False)
        world.from_main(None)  # all begin at once
        seconds = [trainer.train_step(index).seconds for index in range(STEPS + 1)]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        measured = {
            "process": max(world.gather(grown)),
            "seconds": statistics.median(seconds[1:]),
        }
        if case.processes == 1:
            measured["tensors"] = tensor_bytes(trainer)
    return {
        "case": asdict(case),
        "precision": precision,
        "processes": case.processes,
        "predicted": predicted,
        "measured": measured,
    }


def predict(case: Case, config: Any, settings: Any, precision: Any) -> dict[str, Any]:
    """Memory of the fullest process and the time of a step, at the rates that this process measures now."""
    from hearth.parallel.planner.calibration import measure_cpu
    from hearth.parallel.planner.facts import facts_of_config
    from hearth.parallel.planner.job import job_of_recipe
    from hearth.parallel.planner.memory import Plan, memory_of
    from hearth.parallel.planner.step import step_time

    facts = facts_of_config(config)
    cluster = measure_cpu(
        case.processes, facts, tokens=case.micro * case.length, length=case.length, precision=precision
    )
    job = job_of_recipe(settings, precision=precision, device="cpu")
    plan = Plan.of(settings.parallel, case.processes)
    memory = memory_of(facts, job, plan, device="cpu")
    return {
        "parameters": facts.num_parameters,
        "tensors": memory.tensors,
        "process": memory.total,
        "seconds": step_time(facts, job, plan, cluster).seconds,
        "parts": memory.parts(),
    }


def tensor_bytes(trainer: Any) -> int:
    """The peak of all tensors of a step, with what stays from step to step."""
    import torch

    from hearth.training.peak_memory import peak_bytes

    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    kept = [*trainer.model.parameters(), *trainer.model.buffers()]
    kept += [value for value in states if isinstance(value, torch.Tensor)]
    if trainer.updates.average is not None:
        kept += list(trainer.updates.average.state_tensors().values())
    live = peak_bytes(lambda: trainer.train_step(STEPS + 1), torch.device("cpu"))
    return sum(tensor.nbytes for tensor in kept) + live


def run_case(case: Case, threads: int) -> dict[str, Any]:
    """Measure a case in processes of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(case))]
    # Otherwise the C library keeps freed activations in a heap full of holes: up to half as much again.
    heap = {"MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", str(1 << 17))}
    variables = {**heap, "OMP_NUM_THREADS": str(threads if case.processes == 1 else 1)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            printed = run_together(
                command, case.processes, Path(folder), variables=variables, seconds=TIMEOUT
            )
        except WorkersFailed as failed:
            raise SystemExit(f"{case.name}: {failed}") from None
    found: dict[str, Any] = json.loads(printed[0].splitlines()[-1])
    return found


def error(result: dict[str, Any], what: str) -> float:
    """Predicted over measured, less one."""
    return float(result["predicted"][what] / result["measured"][what] - 1.0)


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of all cases, and the medians."""
    mib = 1 << 20
    lines = [
        "| configuration | processes | parameters | tensors predicted, MiB | measured | error "
        "| process predicted, MiB | measured | error | step predicted, s | measured | error |",
        "|---" * 12 + "|",
    ]
    for result in results:
        said, found = result["predicted"], result["measured"]
        cells = [result["case"]["name"], str(result["processes"]), f"{said['parameters'] / 1e6:.1f} M"]
        for what in FIGURES:
            unit = 1.0 if what == "seconds" else mib
            shown = [said[what], found[what]] if what in found else []
            cells += [f"{value / unit:.{2 if what == 'seconds' else 0}f}" for value in shown] or ["-", "-"]
            cells.append(f"{error(result, what):+.1%}" if what in found else "-")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for text, some in (
        ("all", results),
        ("one process", [each for each in results if each["processes"] == 1]),
        ("several processes", [each for each in results if each["processes"] > 1]),
    ):
        found = {name: f"{value:.1%}" for name, value in medians(some).items()}
        if found:
            lines.append(
                f"median error, {text}: " + ", ".join(f"{name} {value}" for name, value in found.items())
            )
    return "\n".join(lines)


def medians(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of the errors' sizes, by figure."""
    errors = {
        what: [abs(error(each, what)) for each in results if what in each["measured"]] for what in FIGURES
    }
    return {what: statistics.median(values) for what, values in errors.items() if values}


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="numbers of configurations, with commas")
    parser.add_argument("--quick", action="store_true", help="three small configurations")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(Case(**json.loads(arguments.worker)))))
        return
    machine = hardware()
    cases = QUICK if arguments.quick else CASES
    if arguments.only:
        cases = [cases[int(number)] for number in arguments.only.split(",")]
    results = []
    started = time.perf_counter()
    for case in cases:
        results.append(run_case(case, arguments.threads))
        print(f"{time.perf_counter() - started:5.0f} s  {case.name}", file=sys.stderr)
    print(table(results))
    name = "planner-quick" if arguments.quick else "planner"
    path = write_result(
        name,
        {"configurations": results, "median errors": medians(results)},
        settings={"threads": arguments.threads, "steps": STEPS},
        machine=machine,
    )
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
