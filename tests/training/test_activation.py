"""Activation checkpointing: the same numbers, less memory, on any model of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config.recipe import AdapterSection
from hearth.errors import ConfigError
from hearth.training.activation import _policy, checkpoint_activations
from hearth.training.adapter import add_adapter
from hearth.training.peak_memory import peak_bytes
from hearth.training.precision import autocast

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen3": {**COMMON, "head_dim": 8},
    "gemma3_text": {**COMMON, "head_dim": 8},
    "mixtral": {**COMMON, "num_local_experts": 4},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt_neox": {key: value for key, value in COMMON.items() if key != "num_key_value_heads"},
}


def make(model_type: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**MODELS[model_type], **changes})
    ).train()


def loss_and_gradients(model: Any, precision: str = "fp32", length: int = 24) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).remainder(10)[None].repeat(2, 1)  # packed rows
    torch.manual_seed(2)  # dropout
    with autocast(precision, CPU):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
    loss.backward()
    return {"loss": loss.detach()} | {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


def assert_bitwise(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_same_loss_and_gradients(model_type: str, mode: str) -> None:
    model = make(model_type)
    expected = loss_and_gradients(copy.deepcopy(model))
    assert len(expected) > 10
    assert checkpoint_activations(model, mode) == 3
    assert_bitwise(loss_and_gradients(model), expected)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_same_in_bfloat16(mode: str) -> None:
    model = make("qwen3")
    expected = loss_and_gradients(copy.deepcopy(model), "bf16")
    checkpoint_activations(model, mode)
    assert_bitwise(loss_and_gradients(model, "bf16"), expected)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_same_with_dropout(mode: str) -> None:
    model = make("gpt2", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2)
    without = loss_and_gradients(make("gpt2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))
    expected = loss_and_gradients(copy.deepcopy(model))
    assert not torch.equal(without["loss"], expected["loss"])
    checkpoint_activations(model, mode)
    assert_bitwise(loss_and_gradients(model), expected)


def test_memory_falls_from_none_over_selective_to_full() -> None:
    model = make("qwen3", num_hidden_layers=6)
    peaks = {}
    for mode in ("none", "selective", "full"):
        checkpoint_activations(model, mode)
        model.zero_grad()
        peaks[mode] = peak_bytes(lambda: loss_and_gradients(model, length=128), CPU)
    assert peaks["selective"] < 0.65 * peaks["none"]
    assert peaks["full"] < 0.65 * peaks["selective"]


def test_selective_computes_no_product_twice() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for mode in ("none", "selective", "full"):
        model = make("llama")
        checkpoint_activations(model, mode)
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(model)
        flops[mode] = counter.get_total_flops()
    assert flops["selective"] == flops["none"]
    assert flops["full"] > 1.2 * flops["none"]


def test_attention_that_draws_random_numbers_is_not_kept() -> None:
    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    q = torch.zeros(1)
    assert _policy(None, attention, q, q, q) == CheckpointPolicy.MUST_SAVE
    assert _policy(None, attention, q, q, q, 0.0) == CheckpointPolicy.MUST_SAVE
    assert _policy(None, attention, q, q, q, 0.1) == CheckpointPolicy.PREFER_RECOMPUTE
    assert _policy(None, attention, q, q, q, dropout_p=0.1) == CheckpointPolicy.PREFER_RECOMPUTE


def test_can_be_turned_off_again() -> None:
    model = make("llama")
    checkpoint_activations(model, "full")
    checkpoint_activations(model, "none")
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.model.layers)


def test_with_an_adapter() -> None:
    def adapted() -> Any:
        return add_adapter(make("llama"), AdapterSection(rank=2), seed=3)

    expected = loss_and_gradients(adapted())
    model = adapted()
    checkpoint_activations(model, "selective")
    found = loss_and_gradients(model)
    assert all("lora_" in name for name in found if name != "loss")
    assert_bitwise(found, expected)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layers that can be checkpointed"):
        checkpoint_activations(nn.Linear(2, 2), "full")
    assert checkpoint_activations(nn.Linear(2, 2), "none") == 0
