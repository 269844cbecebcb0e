"""The random state of a process: python, numpy, torch and the GPU."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
    """The generators of this process as a part of a checkpoint."""

    def __init__(self) -> None:
        self._values: Mapping[str, Any] = {}

    def state_tensors(self) -> dict[str, Tensor]:
        """The states of the generators."""
        return capture()[1]

    def load_state_tensors(self, tensors: dict[str, Tensor], /) -> None:
        """Continue the streams of the checkpoint."""
        restore(self._values, tensors)

    def state_values(self) -> dict[str, Any]:
        """Positions inside the states."""
        return capture()[0]

    def load_state_values(self, values: Mapping[str, Any], /) -> None:
        """Kept until the tensors come."""
        self._values = values
