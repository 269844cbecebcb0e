"""A small problem with matrices, a bias and an embedding, and how to train on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hearth.config.recipe import TrainSection
from hearth.training.optimizers import build_optimizer


class Net(nn.Module):
    """Embedding → hidden layers → output; ``get_output_embeddings`` as transformers models have it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.hidden = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)
        self.lm_head = nn.Linear(width, 11, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.down(torch.tanh(self.norm(self.hidden(self.embed(ids))))))


@pytest.fixture
def make_net() -> Callable[..., nn.Module]:
    def make(width: int = 16, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return Net(width)

    return make


@pytest.fixture
def train_net() -> Callable[..., list[float]]:
    """Train on fixed random pairs; returns the losses."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
        losses = []
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 11, (32,), generator=generator)
            loss = nn.functional.cross_entropy(model(ids), (3 * ids + 1) % 11)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return train


@pytest.fixture
def make_optimizer() -> Callable[..., torch.optim.Optimizer]:
    def make(model: nn.Module, **keys: Any) -> torch.optim.Optimizer:
        return build_optimizer(model, TrainSection.model_validate(keys))

    return make
