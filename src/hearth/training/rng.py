"""The random state of a process: python, numpy, torch and the GPU."""

from __future__ import annotations

import random
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
        "python": [version, list(words), gauss],
        "numpy": {
            "key": [int(word) for word in state["key"]],
            "pos": int(state["pos"]),
            "has_gauss": int(generator["has_gauss"]),
            "gauss": float(generator["gauss"]),
        },
    }
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return values, tensors


def restore(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put every generator back to where ``capture`` found it."""
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = values["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(numpy_state["key"], dtype=np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(tensors["torch"].to(torch.uint8))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].to(torch.uint8))
