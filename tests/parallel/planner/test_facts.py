"""Facts of a model beside the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hearth.config import Recipe
from hearth.errors import ConfigError, UnsupportedModelError
from hearth.models.flops import flops_per_token
from hearth.parallel.planner import ModelFacts, facts_of_config, facts_of_recipe
from hearth.parallel.planner.work import model_flops_per_token

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MOE = {**SMALL, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "tie_word_embeddings": True},
    "mistral": {**SMALL, "sliding_window": 32},
    "gemma3_text": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": MOE,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_counted_once(family: str) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    facts = facts_of_config(config)
    assert facts.num_parameters == sum(weight.numel() for weight in model.parameters())
    assert facts.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("length", [16, 256])
def test_flops_are_those_of_the_model(family: str, length: int) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    facts = facts_of_config(config)
    assert model_flops_per_token(facts, length) == pytest.approx(flops_per_token(config, length), rel=1e-6)


def test_widths(make_facts: Callable[..., ModelFacts], mixture: ModelFacts) -> None:
    facts = make_facts()
    assert (facts.num_layers, facts.query_width, facts.key_width) == (4, 128, 64)
    assert {layer.inner for layer in facts.layers} == {384}
    assert (facts.gated, facts.qk_norm, facts.num_norms) == (True, True, 2)
    assert {layer.expert_inner for layer in mixture.layers} == {64}
    assert {layer.inner for layer in mixture.layers} == {0}
    share = mixture.count("experts") * 2 / 8
    others = mixture.count("attention", "dense", "norm", "head")
    assert mixture.num_active_parameters == pytest.approx(share + others)


def test_four_norms_of_gemma_and_biases_of_gpt2_are_told_apart() -> None:
    gemma = facts_of_config(AutoConfig.for_model("gemma3_text", **SMALL))
    gpt2 = facts_of_config(AutoConfig.for_model("gpt2", **FAMILIES["gpt2"]))
    assert (gemma.num_norms, gpt2.num_norms) == (4, 2)
    assert (gemma.gated, gpt2.gated) == (True, False)
    assert gpt2.layers[0].inner == 256


def test_shared_experts_are_dense() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3",
        **SMALL,
        num_experts_per_tok=2,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    facts = facts_of_config(config)
    assert [(layer.inner, layer.expert_inner) for layer in facts.layers] == [(192, 0), (32, 32)]
    assert facts.num_experts == 8


def test_a_recipe_names_its_model_by_size_or_configuration() -> None:
    by_size = facts_of_recipe(Recipe.model_validate({"model": {"size": "10M"}}))
    assert by_size.num_parameters == pytest.approx(10e6, rel=0.03)
    given = {"model": {"config": {"model_type": "llama", **SMALL}}}
    assert facts_of_recipe(Recipe.model_validate(given)).vocab_size == 512
    assert facts_of_recipe(Recipe.model_validate(given)).num_layers == 2


def test_what_cannot_be_is_refused() -> None:
    short = {"model": {"config": {"model_type": "llama", **SMALL, "max_position_embeddings": 64}}}
    with pytest.raises(ConfigError, match=r"sequence_length 512 exceeds the model's context of 64"):
        facts_of_recipe(Recipe.model_validate(short))
    with pytest.raises(UnsupportedModelError, match="'t5' cannot be planned for"):
        facts_of_config(AutoConfig.for_model("t5"))
