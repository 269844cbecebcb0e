"""The planner's error: what `hearth plan` predicts beside what training really takes, on this machine.

    python benchmarks/planner.py                # all configurations, one process each: 10 minutes on 2 cores
    python benchmarks/planner.py --only 0,3     # some of them, by number
    python benchmarks/planner.py --quick        # two small ones: a minute

Each configuration trains in a process of its own: optimizer steps of the real trainer on rows of random
tokens, two documents in each. *tensors* is the peak of the bytes of all tensors of a step, weights and
optimizer state included, counted at every operator; *process* is how much the process grew from before the
model was built to its peak, as the system reports it, with what kernels and the allocator keep. The C library
is told to give large pieces back at once (MALLOC_MMAP_THRESHOLD_, unless the environment has its own); as it
comes it keeps up to half as much again in a heap full of holes. The time of a step is the median over the
steps but the first. The rates that predict it are measured in the same process, before training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import hardware, write_result


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
]
QUICK = [
    Case("quick", "1M", 1024, 128, 4, 2),
    Case("quick, full", "1M", 1024, 128, 4, 2, checkpointing="full", optimizer="lion"),
]
STEPS = 5


def configuration(case: Case) -> Any:
    """The transformers configuration of a case."""
    from transformers import AutoConfig

    from hearth.models.sizes import config_for_size

    if not case.experts:
        return config_for_size(case.size, case.architecture, case.vocab, case.length)
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
    """Train, in this process; what it took, and what the planner says of it."""
    import torch

    from hearth.models.building import model_from_config
    from hearth.parallel.planner.calibration import measure_cpu
    from hearth.parallel.planner.facts import facts_of_config
    from hearth.parallel.planner.job import job_of_recipe
    from hearth.parallel.planner.memory import Plan, memory_of
    from hearth.parallel.planner.step import step_time
    from hearth.training import Trainer
    from hearth.training.peak_memory import peak_bytes
    from hearth.training.precision import choose_precision

    config, settings = configuration(case), recipe(case)
    precision: Any = choose_precision(case.precision, "cpu")
    facts = facts_of_config(config)
    tokens = case.micro * case.length
    cluster = measure_cpu(1, facts, tokens=tokens, length=case.length, precision=precision)
    job = job_of_recipe(settings, precision=precision, device="cpu")
    predicted = memory_of(facts, job, Plan.of(settings.parallel, 1), device="cpu")
    step = step_time(facts, job, Plan.of(settings.parallel, 1), cluster)
    before = resident_bytes()
    model = model_from_config(config, seed=0)
    trainer = Trainer(model=model, train_dataset=rows_of(case), config=settings, progress=False)
    seconds = [trainer.train_step(index).seconds for index in range(STEPS + 1)]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    kept = [*model.parameters(), *model.buffers(), *(v for v in states if isinstance(v, torch.Tensor))]
    if trainer.updates.average is not None:
        kept += list(trainer.updates.average.state_tensors().values())
    live = peak_bytes(lambda: trainer.train_step(STEPS + 1), torch.device("cpu"))
    return {
        "case": asdict(case),
        "precision": precision,
        "parameters": facts.num_parameters,
        "predicted": {
            "tensors": predicted.tensors,
            "process": predicted.total,
            "seconds": step.seconds,
            "parts": predicted.parts(),
        },
        "measured": {
            "tensors": sum(tensor.nbytes for tensor in kept) + live,
            "process": grown,
            "seconds": statistics.median(seconds[1:]),
        },
    }


def run_case(case: Case, threads: int) -> dict[str, Any]:
    """Measure a case in a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(case))]
    # Otherwise the C library keeps freed activations in a heap full of holes: up to half as much again.
    heap = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    environment = {**heap, **os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def error(result: dict[str, Any], what: str) -> float:
    """Predicted over measured, less one."""
    return float(result["predicted"][what] / result["measured"][what] - 1.0)


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of all cases, and the medians."""
    mib = 1 << 20
    lines = [
        "| configuration | parameters | tensors predicted, MiB | measured | error | process predicted, MiB "
        "| measured | error | step predicted, s | measured | error |",
        "|---" * 11 + "|",
    ]
    for result in results:
        said, found = result["predicted"], result["measured"]
        cells = [result["case"]["name"], f"{result['parameters'] / 1e6:.1f} M"]
        for what in ("tensors", "process", "seconds"):
            shown = (said[what], found[what])
            cells += [f"{value:.2f}" if what == "seconds" else f"{value / mib:.0f}" for value in shown]
            cells.append(f"{error(result, what):+.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    medians = {
        what: statistics.median(abs(error(result, what)) for result in results)
        for what in ("tensors", "process", "seconds")
    }
    lines.append(
        f"\nmedian error: tensors {medians['tensors']:.1%}, process {medians['process']:.1%}, "
        f"seconds {medians['seconds']:.1%}"
    )
    return "\n".join(lines)


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="numbers of configurations, with commas")
    parser.add_argument("--quick", action="store_true", help="two small configurations")
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
        name, results, settings={"threads": arguments.threads, "steps": STEPS}, machine=machine
    )
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
