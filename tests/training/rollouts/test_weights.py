"""What is handed over to the engine: plain weights of plain models and of models with adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hearth.config.recipe import AdapterSection
from hearth.engine import Engine, SamplingParams
from hearth.training.adapter import add_adapter
from hearth.training.rollouts.value_head import with_value_head
from hearth.training.rollouts.weights import keeping_hidden, plain_copy, plain_weights

PROMPTS = [[5, 9, 12], [7], [20, 21, 22, 23, 24]]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def lively(model: Any) -> Any:
    """An adapter begins as nothing; this one changes answers."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_merged_and_the_base_stays_bit_for_bit(
    dora: bool, quantize: str, policy: Callable[..., Any]
) -> None:
    plain = policy()
    section = AdapterSection(rank=4, alpha=64.0, dora=dora, quantize=quantize)
    model = lively(add_adapter(policy(), section, seed=3))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = plain_weights(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    assert not any(getattr(module, "merged", False) for module in model.modules())
    assert found.keys() == dict(plain.named_parameters()).keys()
    ids = torch.tensor([PROMPTS[2]])
    plain.load_state_dict(found)
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-4)
        assert not torch.allclose(policy()(ids).logits, plain(ids).logits, atol=1e-1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_an_engine_gets_the_merged_weights(precision: str, weights: str, policy: Callable[..., Any]) -> None:
    dtype = getattr(torch, precision)
    model = lively(add_adapter(policy(), AdapterSection(rank=4, alpha=64.0), seed=3))
    with Engine.from_model(plain_copy(policy(), dtype=dtype), weights=weights) as engine:
        before = [each.token_ids for each in engine.generate(PROMPTS, GREEDY)]
        engine.update_weights(plain_weights(model))
        found = [each.token_ids for each in engine.generate(PROMPTS, GREEDY)]
    with Engine.from_model(model.merge_and_unload().to(dtype), weights=weights) as fresh:
        assert found == [each.token_ids for each in fresh.generate(PROMPTS, GREEDY)]
    assert found != before


def test_a_copy_is_another_model_and_draws_no_random_numbers(policy: Callable[..., Any]) -> None:
    model = with_value_head(policy(tie_word_embeddings=True))
    state = torch.get_rng_state()
    made = plain_copy(model, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(made, "value_head")
    assert made.config is not model.config
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(made(ids).logits, wanted)
        for weight in made.parameters():
            weight.zero_()
        assert torch.equal(model(ids).logits, wanted)


def test_hidden_states_are_kept_while_asked_for(policy: Callable[..., Any]) -> None:
    model = policy()
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), keeping_hidden(model) as kept:
        logits = model(ids).logits
        assert torch.equal(model.lm_head(kept[0]), logits)
        before = kept[0]
    model(ids)
    assert kept[0] is before
