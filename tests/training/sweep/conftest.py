"""Small sweeps of the tiny recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hearth.config import Recipe
from hearth.config.sweep import SweepSection
from hearth.training.sweep import Sweep


@pytest.fixture
def make_sweep(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Sweep]:
    """A sweep of the tiny recipe; ``recipe`` replaces keys of its sections, the rest those of the sweep."""
    pytest.importorskip("optuna", reason="needs hearth-lm[sweep]")

    def make(recipe: dict[str, Any] | None = None, folder: str = "sweep", **section: Any) -> Sweep:
        values = {"parameters": {"train.learning_rate": {"log": [1e-3, 1e-1]}}, "trials": 3, **section}
        return Sweep.create(
            tmp_path / folder, SweepSection.model_validate(values), make_recipe(**(recipe or {}))
        )

    return make
