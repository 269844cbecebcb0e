"""Compiling block by block: same numbers, one compilation for all blocks, and machines that cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hearth.errors import ConfigError
from hearth.training import compiling
from hearth.training.activation import checkpoint_activations
from hearth.training.compiling import compile_blocks, why_no_compiler

CPU = torch.device("cpu")


@pytest.fixture
def compiler() -> None:
    reason = why_no_compiler("cpu")
    if reason is not None:
        pytest.skip(f"torch cannot compile here: {reason}")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def step(model: Any, num_rows: int = 2, length: int = 16) -> list[torch.Tensor]:
    """Loss and gradients of packed rows."""
    ids = torch.randint(0, 320, (num_rows, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).remainder(6)[None].repeat(num_rows, 1)
    model.zero_grad()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_same_loss_and_gradients_and_one_compilation(
    compiler: None, tiny_model: Any, checkpointing: str
) -> None:
    tiny_model.train()
    expected = step(copy.deepcopy(tiny_model))
    checkpoint_activations(tiny_model, checkpointing)
    assert compile_blocks(tiny_model, CPU, checkpointing=checkpointing) is None
    assert len(tiny_model.model.layers) > 1
    for _ in range(3):
        found = step(tiny_model)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_other_numbers_of_rows_compile_once_more_and_not_each_time(compiler: None, tiny_model: Any) -> None:
    tiny_model.train()
    compile_blocks(tiny_model, CPU)
    for num_rows in (4, 3, 2, 5, 6):
        step(tiny_model, num_rows)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_selective_checkpointing_is_refused(tiny_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"compile with train\.activation_checkpointing: selective"):
        compile_blocks(tiny_model, CPU, checkpointing="selective")


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no decoder layers"):
        compile_blocks(nn.Linear(2, 2), CPU)


def test_without_a_compiler_nothing_is_compiled_and_the_reason_is_told(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: Any, **_keys: Any) -> Any:
        raise RuntimeError("no C++ compiler found\nand more")

    compiling.why_no_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    reason = compile_blocks(tiny_model, CPU)
    compiling.why_no_compiler.cache_clear()
    assert reason == "RuntimeError: no C++ compiler found"
    assert all(layer._compiled_call_impl is None for layer in tiny_model.model.layers)
