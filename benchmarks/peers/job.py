"""What every trainer of the training benchmark shares: the job in its folder, and the meter of a run.

Needs the standard library, numpy and torch only, because it runs in the competitors' own environments. A
worker is ``train.py JOB_FOLDER COMPETITOR FACTS_FILE``. In the folder: ``job.json`` (settings), ``model``
(the first weights, in transformers' format) and ``data.npz``: the packed rows of every step, and for
fine-tuning the same documents one by one.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

IGNORE = -100
ROW_FIELDS = ("input_ids", "labels", "position_ids")


class Job:
    """The settings, and what each optimizer step trains on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / "job.json").read_text())
        with np.load(folder / "data.npz") as found:
            self.data = {name: found[name] for name in found.files}

    def rows(self, step: int) -> list[dict[str, Any]]:
        """The packed rows of a step; ``labels`` are already the next tokens."""
        size = self.settings["batch_size"]
        indices = range(step * size, (step + 1) * size)
        return [{name: self.data[name][index] for name in ROW_FIELDS} for index in indices]

    def documents(self, step: int) -> list[dict[str, list[int]]]:
        """The same as whole documents; ``labels`` stand at their own tokens, as TRL shifts them itself."""
        starts, first = self.data["document_starts"], self.data["step_starts"]
        found = []
        for index in range(int(first[step]), int(first[step + 1])):
            here = slice(int(starts[index]), int(starts[index + 1]))
            tokens, mask = self.data["tokens"][here], self.data["mask"][here]
            labels = np.where(mask, tokens, IGNORE)
            found.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
        return found

    def model(self) -> Any:
        """The model to train, in float32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype="float32")

    def arguments(self, output_dir: str, *, accumulate: int) -> dict[str, Any]:
        """Settings of transformers' `TrainingArguments`, for its own Trainer and those built on it."""
        settings = self.settings
        return {
            "output_dir": output_dir,
            "max_steps": settings["steps"],
            "gradient_accumulation_steps": accumulate,
            "learning_rate": settings["learning_rate"],
            "lr_scheduler_type": "constant",
            "weight_decay": settings["weight_decay"],
            "adam_beta1": settings["beta1"],
            "adam_beta2": settings["beta2"],
            "adam_epsilon": settings["epsilon"],
            "max_grad_norm": settings["grad_clip"],
            "optim": "adamw_torch_fused",
            "bf16": settings["precision"] == "bf16",
            "use_cpu": settings["device"] == "cpu",
            "logging_steps": 1,
            "save_strategy": "steps" if settings["checkpoint_every"] else "no",
            "save_steps": settings["checkpoint_every"] or settings["steps"],
            "save_total_limit": 2,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": settings["device"] == "cuda",
        }


class Meter:
    """Stamps of the steps, their losses, and memory: of the process, or of the GPU where there is one."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.stamps: list[float] = []
        self.losses: list[float] = []
        self.saves: list[dict[str, float]] = []  # of each checkpoint: seconds until written, and of waiting
        self.extra: dict[str, Any] = {}
        self.memory_at_start = self.memory_at_end = 0

    def start(self) -> None:
        """Call when the model is there, and nothing else was computed."""
        self.memory_at_start = self.bytes_now()

    def step(self) -> None:
        """Call after every optimizer step. Memory is that of steps, not of what is saved at the end."""
        self.stamps.append(time.perf_counter())
        self.memory_at_end = self.peak_bytes()

    def peak_bytes(self) -> int:
        if self.device == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated())
        return resident("VmHWM")

    def bytes_now(self) -> int:
        if self.device == "cuda":
            import torch

            return int(torch.cuda.memory_allocated())
        return resident("VmRSS")

    def facts(self, packages: Sequence[str]) -> dict[str, Any]:
        versions = {"python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in packages}
        return {
            "stamps": self.stamps,
            "losses": self.losses,
            "saves": self.saves,
            "memory_at_start": self.memory_at_start,
            "peak_memory": self.memory_at_end,
            "versions": versions,
            **self.extra,
        }


def resident(what: str) -> int:
    """Resident memory of this process in bytes: now (VmRSS) or at its highest (VmHWM).

    Not ``getrusage``: its maximum is inherited from the process that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)
    (line,) = (line for line in status.splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def evenly(items: Sequence[Any], parts: int) -> list[list[Any]]:
    """Cut into ``parts`` consecutive lists whose lengths differ by at most one."""
    edges = [len(items) * part // parts for part in range(parts + 1)]
    return [list(items[a:b]) for a, b in itertools.pairwise(edges)]


Train = Callable[[Job, Meter, Path], None]


def work(trainers: dict[str, Train], packages: Sequence[str]) -> None:
    """The main function of a worker."""
    folder, name, out = sys.argv[1:]
    job = Job(Path(folder))
    meter = Meter(job.settings["device"])
    with tempfile.TemporaryDirectory() as scratch:
        trainers[name](job, meter, Path(scratch))
    Path(out).write_text(json.dumps(meter.facts(packages)))
