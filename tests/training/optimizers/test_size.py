"""The size of a state, known before there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hearth.training.optimizers import optimizer_tensors, state_bytes
from hearth.training.optimizers.build import OPTIMIZERS

Make = Callable[..., Any]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_foretold_is_what_a_step_makes(
    name: str, dtype: torch.dtype, make_net: Make, make_optimizer: Make, train_net: Make
) -> None:
    model = make_net(64).to(dtype)
    optimizer = make_optimizer(model, optimizer=name)
    foretold = state_bytes(optimizer)
    train_net(model, optimizer, 1)
    made = optimizer_tensors(optimizer, model).values()
    assert foretold == sum(value.numel() * value.element_size() for value in made)
