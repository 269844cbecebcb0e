"""Samples, a small float64 model, and trainers for the tests of preference objectives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hearth.config import Recipe
from hearth.training import Trainer
from hearth.training.samples import Sample

VOCAB = 48


@pytest.fixture(scope="session")
def golden(script: Callable[[Path], ModuleType]) -> ModuleType:
    """The script that made the golden numbers: its model and batch."""
    return script(Path(__file__).with_name("make_golden.py"))


def make_samples(count: int, *, num_parts: int = 2, seed: int = 0) -> list[Sample]:
    """Prompts with two answers, or with one and a verdict; lengths differ widely."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        prompt = rng.integers(3, VOCAB, rng.integers(1, 9))
        parts = []
        for _ in range(num_parts):
            tokens = np.concatenate([prompt, rng.integers(3, VOCAB, rng.integers(1, 14))]).astype(np.int64)
            parts.append((tokens, np.arange(len(tokens)) >= len(prompt)))
        found.append(Sample(tuple(parts), 1.0 if num_parts == 2 else float(number % 3 != 1)))
    return found


@pytest.fixture
def samples() -> Callable[..., list[Sample]]:
    """Makes samples."""
    return make_samples


@pytest.fixture
def trainer_of(golden: ModuleType) -> Callable[..., Trainer]:
    """A trainer of an objective on samples; the policy is away from the reference once it has started."""

    def make(
        objective: str,
        rows: Sequence[Sample],
        *,
        model: Any = None,
        train: dict[str, Any] | None = None,
        preference: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Trainer:
        values = {
            "objective": objective,
            "steps": 2,
            "batch_size": len(rows),
            "micro_batch_size": len(rows),
            "precision": "fp32",
            "preference": preference or {},
            **(train or {}),
        }
        sections = arguments.pop("sections", {})
        data = {"sequence_length": 32, **sections.pop("data", {})}
        config = Recipe.model_validate({"train": values, "data": data, **sections})
        if model is None:
            model = golden.make_model(0, reward=objective == "reward")
        return Trainer(
            model=copy.deepcopy(model),
            train_dataset=rows,
            config=config,
            progress=False,
            device="cpu",
            **arguments,
        )

    return make
