"""First weights: by units or all at once, they are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hearth.models.building import model_from_config
from hearth.models.initialising import drawn_units, initialise, units

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MOE = {**SMALL, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": SMALL,
    "llama": SMALL,
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gemma3_text": SMALL,  # a normaliser in a buffer, rotary embeddings of two kinds
    "phi3": SMALL,
    "qwen3_moe": MOE,
    "mixtral": MOE,
    "opt": SMALL,
}


def config_of(family: str) -> Any:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    config.bos_token_id = config.eos_token_id = None
    return config


def on_meta(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_unit_by_unit_as_all_at_once(family: str) -> None:
    expected = tensors_of(model_from_config(config_of(family), seed=7))
    found: dict[str, torch.Tensor] = {}
    for unit in drawn_units(on_meta(config_of(family)), 7, expected):
        found |= unit
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_spread_as_the_family_has_it(family: str) -> None:
    config = config_of(family)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ours = model_from_config(config, seed=1)
    for (name, one), two in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if one.numel() < 500 or not float(one.detach().std()):
            assert float(two.detach().std(correction=0)) == pytest.approx(
                float(one.detach().std(correction=0)), abs=0.02
            ), name
        else:
            assert float(two.detach().std()) == pytest.approx(float(one.detach().std()), rel=0.25), name
    for name, buffer in theirs.named_buffers():
        assert torch.equal(dict(ours.named_buffers())[name], buffer), name


def test_a_unit_does_not_depend_on_others() -> None:
    model = on_meta(config_of("qwen3"))
    last = f"model.layers.{SMALL['num_hidden_layers'] - 1}.mlp.up_proj.weight"
    (alone,) = drawn_units(model, 7, {last})
    everything = {name: t for unit in drawn_units(model, 7, tensors_of(model)) for name, t in unit.items()}
    assert alone.keys() == {last}
    assert torch.equal(alone[last], everything[last])


def test_seeds_differ_and_the_global_state_stays() -> None:
    config = config_of("qwen3")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (tensors_of(model_from_config(config, seed=seed)) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], two[name])
    assert not torch.equal(one[name], one[name.replace("0", "1")])


def test_only_buffers() -> None:
    model = on_meta(config_of("gemma3_text"))
    expected = dict(model_from_config(config_of("gemma3_text")).named_buffers())
    found: dict[str, torch.Tensor] = {}
    for unit in drawn_units(model, 0, tensors_of(model), weights=False):
        found |= unit
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_the_constructor_has_made_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.full((3,), 2.0))

    model = model_from_config(config_of("qwen3"))
    model.model.extra = Scaled()
    model.to("meta")
    with pytest.raises(ValueError, match=r"does not draw model\.extra\.by"):
        list(drawn_units(model, 0, {"model.extra.by"}))


def test_every_tensor_is_in_one_unit() -> None:
    model = model_from_config(config_of("qwen3_moe"))
    names = [name for unit in units(model) for name in unit.tensors()]
    assert sorted(names) == sorted(tensors_of(model))
    assert len(list(units(model))) < len(names) / 4


def test_initialise_draws_anew() -> None:
    model = model_from_config(config_of("qwen3"), seed=1)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    initialise(model, 1)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    initialise(model, 2)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
