"""Small real data, rows and trainers for the tests of the training room."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hearth.config import Recipe
from hearth.models.building import model_from_config
from hearth.models.sizes import config_for_size
from hearth.training import Trainer
from hearth.workspace import Workspace

IGNORE = -100
WORDS = [
    "the",
    "a",
    "dog",
    "cat",
    "bird",
    "sees",
    "hears",
    "finds",
    "small",
    "red",
    "old",
    "house",
    "tree",
    "river",
    "and",
    "then",
    "slowly",
    "quickly",
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def workspace(workspace_dir: Path) -> Any:
    with Workspace.open() as opened:
        yield opened


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 short documents of simple sentences."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(1)
    lines = []
    for number in range(150):
        words = [rng.choice(WORDS) for _ in range(rng.randint(8, 80))]
        lines.append(json.dumps({"id": f"doc-{number}", "text": " ".join(words) + "."}))
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "docs.jsonl"


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 questions with answers."""
    folder = tmp_path_factory.mktemp("chats")
    rng = random.Random(2)
    rows = []
    for number in range(60):
        word = rng.choice(WORDS)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"say {word} {number}"},
                    {"role": "assistant", "content": f"{word} {word}."},
                ]
            }
        )
    (folder / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder / "chats.jsonl"


@pytest.fixture
def make_recipe(corpus: Path) -> Callable[..., Recipe]:
    """A tiny recipe; keyword arguments replace keys of its sections."""

    def make(**sections: dict[str, Any]) -> Recipe:
        values: dict[str, dict[str, Any]] = {
            "model": {"size": "100K", "context_length": 64},
            "tokenizer": {"vocab_size": 320},
            "data": {
                "sources": [{"path": str(corpus), "format": "jsonl"}],
                "validation_fraction": 0.1,
                "sequence_length": 32,
                "num_workers": 1,
            },
            "train": {
                "steps": 8,
                "batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "precision": "fp32",
            },
        }
        for name, changes in sections.items():
            merged = {**values.get(name, {}), **changes}
            values[name] = {key: value for key, value in merged.items() if value is not None}
        return Recipe.model_validate(values)

    return make


def pack_documents(documents: Sequence[Sequence[int]], length: int, masks: Any = None) -> dict[str, Any]:
    """One packed row of whole documents, after the contract of hearth.data.PackedRow."""
    row = {
        "input_ids": np.zeros(length, dtype=np.int64),
        "labels": np.full(length, IGNORE, dtype=np.int64),
        "position_ids": np.zeros(length, dtype=np.int64),
        "segment_ids": np.full(length, -1, dtype=np.int64),
    }
    at = 0
    for number, document in enumerate(documents):
        count = len(document) - 1
        here = slice(at, at + count)
        row["input_ids"][here] = document[:-1]
        row["labels"][here] = document[1:]
        if masks is not None:
            row["labels"][here][~np.asarray(masks[number][1:], dtype=bool)] = IGNORE
        row["position_ids"][here] = np.arange(count)
        row["segment_ids"][here] = number
        at += count
    row["position_ids"][at:] = np.arange(length - at)
    return row


@pytest.fixture(scope="session")
def script() -> Callable[[Path], ModuleType]:
    """Loads a Python file that is no module of a package, such as one that made golden numbers."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def documents() -> list[list[int]]:
    """24 documents of 2 to 15 tokens."""
    rng = random.Random(7)
    return [[rng.randrange(1, 320) for _ in range(rng.randint(2, 15))] for _ in range(24)]


@pytest.fixture
def tiny_model() -> Any:
    """A Qwen3 of 100K random weights."""
    return model_from_config(config_for_size("100K", "qwen3", 320, 64), seed=0)


def make_rows(documents: Sequence[Sequence[int]], length: int = 48, per_row: int = 1) -> list[dict[str, Any]]:
    """Rows of ``per_row`` consecutive documents."""
    return [
        pack_documents(documents[first : first + per_row], length)
        for first in range(0, len(documents), per_row)
    ]


@pytest.fixture
def train_parts(workspace: Workspace, make_recipe: Callable[..., Recipe]) -> Callable[..., Trainer]:
    """A trainer from the tiny recipe in the workspace of the test."""

    def make(*, resume: str | None = None, callbacks: Any = (), **sections: dict[str, Any]) -> Trainer:
        recipe = make_recipe(**sections)
        return Trainer.from_recipe(
            recipe, workspace=workspace, resume=resume, progress=False, callbacks=callbacks, device="cpu"
        )

    return make


@pytest.fixture
def pack() -> Callable[..., dict[str, Any]]:
    """Packs whole documents into one row."""
    return pack_documents


@pytest.fixture
def rows_of() -> Callable[..., list[dict[str, Any]]]:
    """Packs documents into rows."""
    return make_rows
