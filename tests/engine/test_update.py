"""Weights handed over to a loaded engine: afterwards it is as if it had been opened with them."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hearth.engine import Engine, SamplingParams, native
from hearth.errors import ConfigError, EngineError, ModelError

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # of the compiled layers' form
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=0)
# family, its changes, dtype, settings of the engine
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, dict[str, Any]]] = {
    "float32": ("llama", {}, torch.float32, {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}, torch.float32, {}),
    "biases": ("qwen2", {}, torch.float32, {}),
    "conv1d": ("gpt2", {}, torch.float32, {}),
    "experts": ("mixtral", {}, torch.float32, {}),
    "plain": ("llama", {}, torch.float32, {"prepack": False}),
    "int8": ("llama", {}, torch.float32, {"weights": "int8"}),
    "int4": ("llama", {"tie_word_embeddings": True}, torch.float32, {"weights": "int4"}),
    "bf16": ("llama", HEADS, torch.bfloat16, {}),
    "bf16 norms": ("gemma2", {**HEADS, "query_pre_attn_scalar": 32}, torch.bfloat16, {}),
    "bf16 int8": ("qwen3", HEADS, torch.bfloat16, {"weights": "int8"}),
    "bf16 int4": ("llama", HEADS, torch.bfloat16, {"weights": "int4"}),
}


def other_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with every weight changed."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in changed.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            weight.add_(noise * weight.abs().mean().clamp_min(0.05))
    return changed


def answers(engine: Engine, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    engine.pool.reset_cache()  # a cached beginning is computed in other pieces, which moves the last digits
    found = engine.generate(prompts, GREEDY)
    return [(each.token_ids, [entry.logprob for entry in each.logprobs or ()]) for each in found]


@pytest.mark.parametrize("case", CASES)
def test_the_engine_goes_on_as_a_freshly_loaded_one(
    case: str, family_model: Any, prompts: list[list[int]]
) -> None:
    family, changes, dtype, settings = CASES[case]
    model = family_model(family, **changes).to(dtype)
    trained = other_weights(model)
    with Engine.from_model(copy.deepcopy(trained), **settings) as fresh:
        wanted = answers(fresh, prompts)
        compiled = fresh.runner.stack is not None
    with Engine.from_model(copy.deepcopy(model), **settings) as engine:
        before = answers(engine, prompts)
        engine.update_weights(dict(trained.named_parameters()))
        assert engine.pool.num_cached == 0
        assert answers(engine, prompts) == wanted
        assert (engine.runner.stack is not None) is compiled
    assert before != wanted
    if dtype is torch.bfloat16 and family == "llama" and native.library() is not None:
        assert compiled, "the compiled layers are what this case is about"


def test_the_engine_keeps_copies(family_model: Any, prompts: list[list[int]]) -> None:
    trained = other_weights(family_model("llama"))
    with Engine.from_model(family_model("llama")) as engine:
        engine.update_weights(dict(trained.named_parameters()))
        wanted = answers(engine, prompts)
        with torch.no_grad():
            for weight in trained.parameters():
                weight.zero_()
        assert answers(engine, prompts) == wanted


def test_weights_that_are_not_named_stay(family_model: Any, prompts: list[list[int]]) -> None:
    model = family_model("llama")
    trained = other_weights(model)
    name = "model.layers.1.mlp.down_proj.weight"
    mixed = copy.deepcopy(model)
    with torch.no_grad():
        mixed.get_parameter(name).copy_(trained.get_parameter(name))
    with Engine.from_model(mixed) as fresh:
        wanted = answers(fresh, prompts)
    with Engine.from_model(copy.deepcopy(model)) as engine:
        engine.update_weights({name: trained.get_parameter(name)})
        assert answers(engine, prompts) == wanted


def test_what_cannot_be_replaced_is_refused_and_nothing_changes(
    family_model: Any, prompts: list[list[int]]
) -> None:
    model = family_model("qwen2")
    weights = dict(other_weights(model).named_parameters())
    norm, bias = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
    with Engine.from_model(model) as engine:
        before = answers(engine, prompts)
        with pytest.raises(ModelError, match=r"no weight model\.norms\.weight\n  fix: did you mean"):
            engine.update_weights({**weights, "model.norms.weight": weights[norm]})
        with pytest.raises(ModelError, match=r"norm\.weight has the shape \(3,\), the model's is \(64,\)"):
            engine.update_weights({**weights, norm: torch.zeros(3)})
        with pytest.raises(ModelError, match=r"q_proj\.bias is packed together with its weight"):
            engine.update_weights({norm: weights[norm], bias: weights[bias]})
        engine.add_request("running", prompts[0], GREEDY)
        with pytest.raises(EngineError, match="1 requests run"):
            engine.update_weights(weights)
        engine.abort("running")
        assert answers(engine, prompts) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_released_cache_is_gone_and_there_again_when_needed(
    dtype: torch.dtype, family_model: Any, prompts: list[list[int]]
) -> None:
    model = family_model("llama", **HEADS).to(dtype)
    with Engine.from_model(model) as engine:
        wanted, size = answers(engine, prompts), engine.runner.num_bytes
        blocks = [weakref.ref(part) for layer in engine.runner.layers for part in layer.pool.parts]
        engine.release_cache()
        assert all(block() is None for block in blocks)
        assert engine.runner.num_bytes == size
        assert answers(engine, prompts) == wanted
        engine.add_request("running", prompts[0], GREEDY)
        with pytest.raises(EngineError, match="lose their keys and values"):
            engine.release_cache()


def test_processes_that_share_a_model_are_refused(family_model: Any) -> None:
    with Engine.from_model(family_model("llama")) as engine:
        engine.config = engine.config.with_(tensor_parallel=2)
        with pytest.raises(ConfigError, match="other processes hold them"):
            engine.update_weights({})
        engine.config = engine.config.with_(tensor_parallel=1)
