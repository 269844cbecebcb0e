"""A size gives a model of that size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hearth.errors import ConfigError
from hearth.models import config_for_size, flops_per_token, format_count, num_parameters, parse_size
from hearth.models.sizes import shape_for_size, tensor_splits


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("260K", 260_000),
        ("10M", 10_000_000),
        ("1.5B", 1_500_000_000),
        ("70b", 70_000_000_000),
        ("12345", 12345),
    ],
)
def test_parse_size(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "ten", "10 million", "-5M", "0", "10MB", "K"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="not a number of parameters"):
        parse_size(text)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize(
    ("size", "vocab_size"),
    [
        ("100K", 512),
        ("250K", 512),
        ("1M", 1024),
        ("3M", 4096),
        ("5M", 8192),
        ("20M", 8192),
        ("60M", 8192),
        ("125M", 32000),
        ("500M", 32000),
        ("1.7B", 151936),
        ("8B", 128256),
        ("14B", 151936),
        ("70B", 128256),
    ],
)
def test_model_has_the_size_asked_for(architecture: str, size: str, vocab_size: int) -> None:
    config = config_for_size(size, architecture, vocab_size, 512)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert num_parameters(model) == pytest.approx(parse_size(size), rel=0.03)
    assert config.vocab_size == vocab_size
    assert config.max_position_embeddings == 512
    assert config.hidden_size == config.num_attention_heads * config.head_dim
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.tie_word_embeddings == (parse_size(size) < 4_500_000_000)


@given(size=st.integers(200_000, 10**11), vocab_size=st.integers(260, 200_000))
def test_every_shape_fits_or_is_refused(size: int, vocab_size: int) -> None:
    try:
        shape = shape_for_size(size, "qwen3", vocab_size)
    except ConfigError:
        # Only where embeddings would eat most of the model.
        assert vocab_size * 8 > size * 0.05
        return
    assert shape.parameters("qwen3", vocab_size) == pytest.approx(size, rel=0.03)
    assert shape.head_dim % 8 == 0
    assert shape.num_heads * shape.head_dim == shape.hidden_size


@settings(max_examples=30)
@given(size=st.integers(100_000_000, 10**11), vocab_size=st.integers(260, 150_000))
def test_large_models_can_be_split(size: int, vocab_size: int) -> None:
    shape = shape_for_size(size, "qwen3", vocab_size)
    splits = tensor_splits(size)
    assert splits == (8 if size >= 1_000_000_000 else 2)
    for what in (shape.num_heads, shape.num_kv_heads, shape.intermediate_size):
        assert what % splits == 0, shape


def test_published_shapes_are_near() -> None:
    """Qwen3-1.7B has 2048 x 28 with 16 heads and 8, Llama-3.1-8B 4096 x 32 with 32 and 8."""
    small, large = (
        shape_for_size(1_720_000_000, "qwen3", 151936),
        shape_for_size(8_030_000_000, "llama", 128256),
    )
    assert (small.hidden_size, small.num_heads, small.num_kv_heads) == (2048, 16, 8)
    assert (large.hidden_size, large.num_heads, large.num_kv_heads) == (4096, 32, 8)


def test_small_shapes_stay_what_they_are() -> None:
    """Models of these sizes exist: the demo's and those of published measurements."""
    found = [shape_for_size(size, "qwen3", 8192) for size in (5_000_000, 20_000_000, 60_000_000)]
    assert [
        (shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads) for shape in found
    ] == [(256, 4, 4, 2), (384, 9, 6, 3), (640, 11, 10, 5)]


def test_too_large_vocabulary_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"vocabulary of 151936.*\n.*tokenizer\.vocab_size"):
        config_for_size("500K", "qwen3", 151936)


def test_unknown_architecture() -> None:
    with pytest.raises(ConfigError, match="'mamba' has no shape") as caught:
        config_for_size("10M", "mamba")
    assert "qwen3" in str(caught.value)


def test_format_count() -> None:
    assert [format_count(value) for value in (512, 5_100_000, 7e10)] == ["512", "5.1M", "70B"]


def test_flops_by_hand() -> None:
    config = config_for_size("5M", "llama", 1024, 512)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    heads = config.num_attention_heads * config.head_dim
    by_hand = 6 * num_parameters(model) + 6 * config.num_hidden_layers * heads * 256
    assert flops_per_token(config, 256) == pytest.approx(by_hand)
    assert flops_per_token(model, 256) == pytest.approx(by_hand)


def test_flops_leave_out_an_untied_embedding_and_idle_experts() -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    experts = 2 * 8 * 3 * 32 * 16
    active = num_parameters(model) - 128 * 32 - experts * 6 / 8
    assert flops_per_token(model, 64) == pytest.approx(6 * active + 6 * 2 * 32 * 64)
