"""The random state of a process: python, numpy, torch and the GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hearth.parallel.world import World


def seed_everything(seed: int) -> None:
    """Start all generators from ``seed``."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def capture() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON-able values and tensors that ``restore`` takes."""
    version, words, gauss = random.getstate()
    generator = np.random.get_state(legacy=False)
    assert isinstance(generator, dict)
    state = generator["state"]
    values = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "pos": int(state["pos"]),
            "has_gauss": int(generator["has_gauss"]),
            "gauss": float(generator["gauss"]),
        },
    }
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor(state["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return values, tensors


def restore(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put every generator back to where ``capture`` found it."""
    python, numpy_state = values["python"], values["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


class RandomState:
    """The generators of all processes as a part of a checkpoint.

    A run that goes on with another number of processes cannot continue their streams: it gets new ones that
    follow from ``seed`` and the step, and says that it is not exact (`Identity.inexact`).
    """

    def __init__(self, world: World, seed_for: Callable[[], int]) -> None:
        self._world, self._seed_for = world, seed_for
        self._values: Mapping[str, Any] = {}

    def state_tensors(self) -> dict[str, Tensor]:
        """The states of the generators, by ``RANK|NAME``; each process gives its own."""
        return {f"{self._world.rank}|{name}": state for name, state in capture()[1].items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], /) -> None:
        """Continue the streams of the checkpoint."""
        if len(self._values) != self._world.size:
            seed_everything(self._seed_for() + self._world.rank)
            return
        own = f"{self._world.rank}|"
        streams = {name.removeprefix(own): tensors[name] for name in tensors if name.startswith(own)}
        restore(self._values[str(self._world.rank)], streams)

    def state_values(self) -> dict[str, Any]:
        """Positions inside the states, by rank; all processes must ask."""
        return {str(rank): values for rank, values in enumerate(self._world.gather(capture()[0]))}

    def load_state_values(self, values: Mapping[str, Any], /) -> None:
        """Kept until the tensors come."""
        self._values = values
