"""Models that the engine must refuse, with the reason; rotary embeddings that must be pinned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from hearth.engine import Engine, SamplingParams
from hearth.errors import ConfigError, UnsupportedModelError

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}, "interface|position_ids"),
    "falcon": (
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
            "alibi": True,
        },
        "ALiBi",
    ),
    "moshi": (
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
            "ffn_dim": 64, "sliding_window": 8,
        },
        "other tokens with a cache than without",
    ),
    "diffllama": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64},
        "called several times",
    ),
    "bert": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64},
        "BertLMHeadModel: its attention is not causal",
    ),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}, "linear_attention"),
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "vocab_size": 64}, "interface"),
    "qwen3_next": (
        {
            "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "vocab_size": 64, "num_experts": 2, "num_experts_per_tok": 1,
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "linear_attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_reason(family: str) -> None:
    fields, reason = REFUSED[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields))
    with pytest.raises(UnsupportedModelError, match=reason):
        Engine.from_model(model)


def test_encoder_decoder_is_refused() -> None:
    config = CONFIG_MAPPING["t5"](d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=64)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        Engine.from_model(AutoModelForSeq2SeqLM.from_config(config))


def test_a_state_outside_the_cache_is_noticed(family_model: Any) -> None:
    """A layer that mixes neighbouring tokens by itself passes the reading, and fails the comparison."""
    model: PreTrainedModel = family_model("llama")

    def mix(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output + torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    model.model.layers[1].mlp.register_forward_hook(mix)
    with pytest.raises(UnsupportedModelError, match="differ from its own"):
        Engine.from_model(model)


def test_a_linear_whose_weight_is_read_stays_as_it_is(
    family_model: Any, prompts: list[list[int]], transformers_tokens: Any
) -> None:
    """Packed, its weight is no more than a shape; the other linears are packed."""
    model: PreTrainedModel = family_model("longcat_flash")
    expected = transformers_tokens(model, prompts, 8)
    with Engine.from_model(model) as engine:
        completions = engine.generate(prompts, SamplingParams(max_tokens=8, temperature=0))
        kinds = {type(module).__name__ for module in engine.runner.model.modules()}
        routers = [m for name, m in model.named_modules() if name.endswith("router.classifier")]
    assert "PackedLinear" in kinds
    assert [type(module) for module in routers] == [torch.nn.Linear] * 2
    assert [c.token_ids for c in completions] == expected


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}


def longrope_model(family_model: Any) -> PreTrainedModel:
    model: PreTrainedModel = family_model(
        "phi3",
        rope_parameters=dict(LONGROPE),
        original_max_position_embeddings=32,
        max_position_embeddings=128,
    )
    return model


def test_longrope_uses_the_short_factors_by_default(
    family_model: Any, prompts: list[list[int]], transformers_tokens: Any
) -> None:
    short = [prompt[:6] for prompt in prompts]
    expected = transformers_tokens(longrope_model(family_model), short, 20)
    with Engine.from_model(longrope_model(family_model)) as engine:
        assert engine.max_model_len == 32
        completions = engine.generate(short, SamplingParams(max_tokens=20, temperature=0))
    assert [c.token_ids for c in completions] == expected


def test_longrope_is_the_same_for_every_batch(family_model: Any) -> None:
    """Long factors for all, if asked for a long context: a short prompt is the same beside a long one."""
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    with Engine.from_model(longrope_model(family_model), max_model_len=100, prefix_cache=False) as engine:
        alone = engine.generate([[5, 6, 7]], params)[0].token_ids
        beside = engine.generate([[5, 6, 7], [9] * 60], params)[0].token_ids
    with Engine.from_model(longrope_model(family_model)) as engine:
        short = engine.generate([[5, 6, 7]], params)[0].token_ids
    assert alone == beside
    assert alone != short


def test_dynamic_ntk_is_refused_beyond_its_length(family_model: Any) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with Engine.from_model(family_model("llama", rope_parameters=rope)) as engine:
        assert engine.max_model_len == 256
    with pytest.raises(ConfigError, match="256"):
        Engine.from_model(family_model("llama", rope_parameters=rope), max_model_len=300)
