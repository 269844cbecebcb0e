"""What the training benchmark trains on: datasets by Hearth, and a job folder that every competitor can read.

The order of the documents, their packing and the first weights are Hearth's; the others get the same.
"""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GSM8K = Path(__file__).resolve().parents[3] / "shared/data/gsm8k/train.jsonl.gz"
NO_GSM8K = "sft is skipped: no gsm8k/train.jsonl.gz in ../shared/data (github.com/openai/grade-school-math)"


@dataclass(frozen=True)
class Shape:
    """One model on one kind of data. A step has ``batch_size`` rows of ``length`` tokens."""

    objective: str  # sft or pretrain
    size: str
    steps: int
    length: int = 512
    micro_batch_size: int = 8
    batch_size: int = 16
    vocab: int = 8192
    checkpoint_every: int = 0


@dataclass(frozen=True)
class Prepared:
    """A job in its folder, and what turns seconds into figures."""

    folder: Path
    tokens: list[int]  # of each step, without padding
    flops_per_token: float
    parameters: int


def prepare_text(folder: Path, *, num_files: int | None) -> Any:
    """The modules of Python's standard library, as many as asked for."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py"))[:num_files]
    sources = folder / "sources"
    sources.mkdir()
    for file in files:
        shutil.copy(file, sources / file.name)
    return _prepare(
        folder, {"path": str(sources / "*.py"), "format": "text"}, vocab=8192 if not num_files else 512
    )


def prepare_gsm8k(folder: Path, *, num_lines: int | None) -> Any:
    """Questions as the user's turn, worked answers as the assistant's; the first lines, or all."""
    path = folder / "gsm8k.jsonl"
    with gzip.open(GSM8K, "rt", encoding="utf-8") as lines:
        path.write_text("".join(itertools.islice(lines, num_lines)), encoding="utf-8")
    source = {"path": str(path), "format": "chat", "prompt_field": "question", "response_field": "answer"}
    return _prepare(folder, source, vocab=8192 if num_lines is None else 512)


def _prepare(folder: Path, source: dict[str, Any], *, vocab: int) -> Any:
    from hearth.config import Recipe
    from hearth.data import prepare_dataset

    recipe = {"data": {"sources": [source]}, "tokenizer": {"vocab_size": vocab}}
    return prepare_dataset(Recipe.model_validate(recipe), folder / "dataset")


def recipe_of(shape: Shape, precision: str) -> dict[str, Any]:
    """Hearth's settings; those of the others are made of them."""
    return {
        "model": {"size": shape.size, "context_length": shape.length},
        "data": {"sequence_length": shape.length},
        "train": {
            "objective": shape.objective,
            "steps": shape.steps,
            "batch_size": shape.batch_size,
            "micro_batch_size": shape.micro_batch_size,
            "learning_rate": 1e-3,
            # Warmup is defined one step apart by the competitors; a constant rate makes losses comparable.
            "schedule": "constant",
            "precision": precision,
        },
        "checkpoint": {"every": shape.checkpoint_every},
    }


def write_job(folder: Path, shape: Shape, dataset: Any, *, precision: str, device: str) -> Prepared:
    """Weights, rows and settings; see ``benchmarks/peers/job.py``, which reads them."""
    from hearth.config import Recipe
    from hearth.models import build_model, flops_per_token, num_parameters
    from hearth.models.loading import quiet_transformers
    from hearth.training.batches import as_rows, step_rows

    settings = recipe_of(shape, precision)
    recipe = Recipe.model_validate(settings)
    section, data = recipe.train, recipe.data
    rows: Any = as_rows(
        dataset,
        split="train",
        sequence_length=shape.length,
        packing=data.packing,
        seed=data.seed,
        truncate=data.truncate,
    )
    order = [
        step_rows(step, batch_size=shape.batch_size, seed=section.seed, num_rows=len(rows))
        for step in range(shape.steps)
    ]
    batches = [rows.batch(indices) for indices in order]
    arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    if shape.objective == "sft":
        arrays |= _documents(rows, order)
    folder.mkdir()
    np.savez(folder / "data.npz", **arrays)
    model = build_model(recipe.model, vocab_size=max(shape.vocab, dataset.tokenizer().vocab_size), seed=0)
    with quiet_transformers():
        model.save_pretrained(folder / "model")
    shutil.copytree(dataset.tokenizer_dir, folder / "model", dirs_exist_ok=True)
    common = {
        name: getattr(section, name)
        for name in ("steps", "batch_size", "micro_batch_size", "learning_rate", "weight_decay")
    }
    common |= {name: getattr(section, name) for name in ("beta1", "beta2", "epsilon", "grad_clip")}
    job = {
        **common,
        "length": shape.length,
        "precision": precision,
        "device": device,
        "checkpoint_every": shape.checkpoint_every,
        "dataset": str(dataset.path),
        "recipe": settings,
    }
    (folder / "job.json").write_text(json.dumps(job, indent=1))
    return Prepared(
        folder,
        [int((batch["segment_ids"] >= 0).sum()) for batch in batches],
        flops_per_token(model, shape.length),
        num_parameters(model),
    )


def _documents(rows: Any, order: list[list[int]]) -> dict[str, Any]:
    """The documents of each step, whole and one by one: conversations are never cut."""
    tokens, masks, per_step = [], [], []
    for indices in order:
        found = [document for index in indices for document, _, _ in rows.segments(index)]
        per_step.append(len(found))
        for document in found:
            tokens.append(rows.split.tokens(document))
            masks.append(rows.split.loss_mask(document))
    lengths = [len(each) for each in tokens]
    return {
        "tokens": np.concatenate(tokens),
        "mask": np.concatenate(masks),
        "document_starts": np.cumsum([0, *lengths]),
        "step_starts": np.cumsum([0, *per_step]),
    }
