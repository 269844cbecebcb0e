"""Parts of a checkpoint: whoever has state registers, and a checkpoint with other parts is refused."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hearth.errors import ConfigError, IntegrityError
from hearth.parallel.world import World
from hearth.training import rng
from hearth.training.checkpoint import (
    Checkpoint,
    CheckpointSaver,
    CheckpointStore,
    Counters,
    Stateful,
    Weights,
    collect,
    restore,
)


class Average:
    """Tensors alone."""

    def __init__(self, value: float) -> None:
        self.w = torch.full((3,), value)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {"w": self.w}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        torch.rand(1)  # a careless part draws while it loads
        self.w.copy_(tensors["w"])


@dataclass
class Scale(Counters):
    """Values alone."""

    factor: float = 1.0
    history: tuple[int, ...] = ()


class Both(Average):
    """Tensors and values."""

    def __init__(self, value: float, name: str) -> None:
        super().__init__(value)
        self.name = name
        self.order: list[str] = []

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.order.append("tensors")
        super().load_state_tensors(tensors)

    def state_values(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_values(self, values: Mapping[str, Any]) -> None:
        self.order.append("values")
        self.name = values["name"]


def saved(tmp_path: Path, parts: dict[str, Stateful]) -> Checkpoint:
    saver = CheckpointSaver(CheckpointStore(tmp_path), background=True)
    saver.save(1, lambda: (collect(parts), {}))
    saver.wait()
    return saver.store.load_newest()


def test_every_part_comes_back(tmp_path: Path) -> None:
    def parts(value: float, name: str) -> dict[str, Any]:
        scale = Scale(value, (1, 2))
        streams = rng.RandomState(World.alone(torch.device("cpu")), lambda: 0)
        return {"rng": streams, "ema": Average(value), "scaler": scale, "both": Both(value, name)}

    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    random.gauss(0, 1), np.random.standard_normal()  # leaves a second value waiting in each of them
    before = parts(3.25, "old")
    checkpoint = saved(tmp_path, before)
    drawn = (
        random.gauss(0, 1),
        random.random(),
        np.random.standard_normal(3).tolist(),
        torch.rand(3).tolist(),
    )
    after = parts(9.0, "new")
    restore(after, checkpoint)
    again = (
        random.gauss(0, 1),
        random.random(),
        np.random.standard_normal(3).tolist(),
        torch.rand(3).tolist(),
    )
    assert again == drawn
    assert torch.equal(after["ema"].w, torch.full((3,), 3.25))
    assert (after["scaler"].factor, list(after["scaler"].history)) == (3.25, [1, 2])
    assert after["both"].name == "old"
    assert after["both"].order == ["values", "tensors"]


def test_other_parts_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"model": Average(1.0), "scaler": Scale(2.0)})
    own: dict[str, Any] = {"model": Average(5.0), "ema": Average(6.0)}
    with pytest.raises(
        ConfigError, match="has no state of ema, has state of scaler, which this run"
    ) as caught:
        restore(own, checkpoint)
    assert "keep the settings of the run" in str(caught.value)
    assert float(own["model"].w[0]) == 5.0


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    first, second = torch.nn.Linear(3, 4), torch.nn.Linear(3, 5)
    checkpoint = saved(tmp_path, {"model": Weights(lambda: dict(first.named_parameters()))})
    with pytest.raises(IntegrityError, match="weights of another model: bias differs"):
        restore({"model": Weights(lambda: dict(second.named_parameters()))}, checkpoint)
    third = torch.nn.Linear(3, 4)
    restore({"model": Weights(lambda: dict(third.named_parameters()))}, checkpoint)
    assert torch.equal(third.weight, first.weight)


def test_a_part_without_tensors_has_no_file(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"model": Average(1.0), "scaler": Scale(2.0)})
    assert sorted(file.name for file in checkpoint.path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "state.json",
    ]
    assert checkpoint.tensors["scaler"] == {}
