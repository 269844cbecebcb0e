"""Training: Hearth's loop beside transformers' Trainer, on the same model, rows, precision and optimizer.

    python benchmarks/training.py            # 5M and 20M on the CPU, about ten minutes
    python benchmarks/training.py --quick    # a smoke test of a minute

Each measurement is a process of its own, so that its peak memory is its own; the two take turns. Rows are
packed documents of Zipf-distributed tokens; both see the same rows in the same order from the same weights,
and the losses of the last step are printed side by side. MFU = flops_per_token x tokens/s / peak, with the
formula of ``hearth.models.flops_per_token`` and, for both, the measured peak of a matrix product.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

NAMES = ("hearth", "transformers")


def make_rows(num_rows: int, length: int, vocab_size: int) -> list[dict[str, Any]]:
    """Packed rows of documents whose lengths and tokens are as skewed as those of text."""
    import numpy as np

    from hearth.data import PackPlan

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.6, 0.8, size=num_rows * 4).astype(int), 8, 4 * length)
    plan = PackPlan.build(lengths, length, seed=0)
    documents = [np.minimum(rng.zipf(1.3, size=size) + 3, vocab_size - 1) for size in lengths]
    rows = []
    for index in range(min(num_rows, plan.num_rows)):
        row = {
            "input_ids": np.zeros(length, dtype=np.int64),
            "labels": np.full(length, -100, dtype=np.int64),
            "position_ids": np.zeros(length, dtype=np.int64),
            "segment_ids": np.full(length, -1, dtype=np.int64),
        }
        at = 0
        for number, segment in enumerate(range(int(plan.row_starts[index]), int(plan.row_starts[index + 1]))):
            start, count = int(plan.starts[segment]), int(plan.lengths[segment])
            tokens = documents[int(plan.documents[segment])][start : start + count + 1]
            here = slice(at, at + count)
            row["input_ids"][here], row["labels"][here] = tokens[:-1], tokens[1:]
            row["position_ids"][here] = np.arange(count)
            row["segment_ids"][here] = number
            at += count
        row["position_ids"][at:] = np.arange(length - at)
        rows.append(row)
    return rows


def recipe_of(options: argparse.Namespace, size: str) -> Any:
    """The settings of one measurement."""
    from hearth.config import Recipe

    return Recipe.model_validate(
        {
            "model": {"size": size, "context_length": options.length},
            "data": {"sequence_length": options.length},
            "train": {
                "steps": options.steps,
                "batch_size": options.micro * options.accumulate,
                "micro_batch_size": options.micro,
                "learning_rate": 1e-3,
                # The two define warmup one step apart; a constant rate makes the losses comparable.
                "schedule": "constant",
                "precision": options.precision,
            },
        }
    )


def run_hearth(options: argparse.Namespace, size: str, folder: Path) -> dict[str, Any]:
    """Train with ``hearth.Trainer``; the whole ``fit``, checkpoint at the end apart."""
    from hearth.models import build_model
    from hearth.training import Callback, Trainer
    from hearth.workspace import Workspace

    class Times(Callback):
        stamps: list[float] = []  # noqa: RUF012 - one instance
        losses: list[float] = []  # noqa: RUF012

        def on_step(self, trainer: Any, step: int, metrics: Any) -> None:  # noqa: ARG002
            self.stamps.append(time.perf_counter())
            self.losses.append(metrics["loss"])

    recipe, times = recipe_of(options, size), Times()
    model = build_model(recipe.model, vocab_size=options.vocab, seed=0)
    rows = make_rows(options.rows, options.length, options.vocab)
    with Workspace.open(folder) as workspace:
        trainer = Trainer(
            model=model,
            train_dataset=rows,
            config=recipe,
            workspace=workspace,
            progress=False,
            callbacks=[times],
        )
        precision = trainer.precision
        trainer.fit()
    return {"stamps": times.stamps, "losses": times.losses, "precision": precision}


def run_transformers(options: argparse.Namespace, size: str, folder: Path) -> dict[str, Any]:
    """Train with ``transformers.Trainer`` as its documentation shows, on the rows in Hearth's order."""
    import numpy as np
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    from hearth.models import build_model
    from hearth.training.batches import step_rows
    from hearth.training.precision import choose_device, choose_precision

    logging.set_verbosity_error()
    recipe = recipe_of(options, size)
    section = recipe.train
    model = build_model(recipe.model, vocab_size=options.vocab, seed=0)
    model.config.use_cache = False  # a cache would turn the isolation of packed documents off
    rows = make_rows(options.rows, options.length, options.vocab)
    order = [
        row
        for step in range(options.steps)
        for row in step_rows(step, batch_size=section.batch_size, seed=section.seed, num_rows=len(rows))
    ]

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        names = ("input_ids", "position_ids", "labels")
        batch = {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in names}
        # Hearth's labels are already the next tokens; this is transformers' name for such labels.
        return {**batch, "shift_labels": batch["labels"]}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    stamps: list[float] = []

    class Times(TrainerCallback):
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            stamps.append(time.perf_counter())

    device = choose_device()
    precision = choose_precision(section.precision, device)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=section.micro_batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=section.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_epsilon=section.epsilon,
        max_grad_norm=section.grad_clip,
        optim="adamw_torch_fused",
        bf16=precision == "bf16",
        use_cpu=device.type == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
    )
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=[rows[index] for index in order],
        data_collator=collate,
        callbacks=[Times()],
    )
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {"stamps": stamps, "losses": losses, "precision": precision}


def measure(options: argparse.Namespace) -> None:
    """The worker process: one competitor, one size; facts as one line of JSON."""
    import torch

    from hearth.models import build_model, flops_per_token, num_parameters, peak_flops
    from hearth.training.precision import choose_device

    size = options.sizes[0]
    with tempfile.TemporaryDirectory() as folder:
        run = run_hearth if options.worker == "hearth" else run_transformers
        facts = run(options, size, Path(folder))
    device = choose_device()
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = build_model(recipe_of(options, size).model, vocab_size=options.vocab, seed=0)
    # The first step warms up. A step is the median of what is left.
    steps = [later - earlier for earlier, later in zip(facts["stamps"], facts["stamps"][1:], strict=False)]
    rows = make_rows(options.rows, options.length, options.vocab)
    filled = statistics.mean(float((row["segment_ids"] >= 0).mean()) for row in rows)
    tokens = options.micro * options.accumulate * options.length * filled
    rate = tokens / statistics.median(steps)
    dtype = torch.bfloat16 if facts["precision"] == "bf16" else torch.float32
    flops = flops_per_token(model, options.length)
    print(
        json.dumps(
            {
                "tokens_per_second": rate,
                "mfu": rate * flops / peak_flops(device, dtype),
                "peak_memory_mib": memory / 2**20,
                "last_loss": facts["losses"][-1],
                "parameters": num_parameters(model),
                "precision": facts["precision"],
                "device": str(device),
                "flops_per_token": flops,
            }
        )
    )


def spawn(name: str, size: str, arguments: list[str]) -> dict[str, Any]:
    """Run one worker and return its facts."""
    command = [sys.executable, __file__, "--worker", name, *arguments, "--sizes", size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def main() -> None:
    """Measure in turns, print the tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small model, few steps, one round")
    parser.add_argument("--sizes", nargs="+", default=["5M", "20M"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.steps, options.micro, options.length = ["1M"], 3, 2, 128
        options.vocab, options.rows, options.rounds = 1024, 32, 1
    if options.worker:
        measure(options)
        return
    machine = common.hardware()
    keys = ("steps", "micro", "accumulate", "length", "vocab", "rows", "precision")
    arguments = [text for key in keys for text in (f"--{key}", str(getattr(options, key)))]
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for size in options.sizes:
        results[size] = {name: [] for name in NAMES}
        for round_ in range(options.rounds):
            # Whoever goes first changes from round to round.
            for name in NAMES if round_ % 2 == 0 else reversed(NAMES):
                results[size][name].append(spawn(name, size, arguments))
                print(f"{size} round {round_ + 1} {name}: {results[size][name][-1]}", file=sys.stderr)
    print(f"# Training, {results[options.sizes[0]]['hearth'][0]['precision']}, {machine['cpu']}\n")
    for key, unit, higher in (
        ("tokens_per_second", "tokens/s", True),
        ("mfu_percent", "MFU %", True),
        ("peak_memory_mib", "peak memory MiB", False),
    ):
        rows = {
            size: {
                name: [100 * run["mfu"] if key == "mfu_percent" else run[key] for run in runs]
                for name, runs in by_name.items()
            }
            for size, by_name in results.items()
        }
        print(common.ratio_table(rows, ours="hearth", unit=unit, higher_is_better=higher), "\n")
    for size, by_name in results.items():
        losses = ", ".join(f"{name} {runs[0]['last_loss']:.4f}" for name, runs in by_name.items())
        print(f"{size}: loss of step {options.steps}: {losses}")
    settings = {key: getattr(options, key) for key in (*keys, "rounds")}
    print("written to", common.write_result("training", results, settings=settings, machine=machine))


if __name__ == "__main__":
    main()
