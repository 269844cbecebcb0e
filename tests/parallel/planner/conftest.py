"""Shapes that the tests of the planner share; none has weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoConfig

from hearth.parallel.planner import ModelFacts, facts_of_config


@pytest.fixture(scope="session")
def make_facts() -> Callable[..., ModelFacts]:
    """The facts of a small decoder; keyword arguments replace keys of its configuration."""

    def make(model_type: str = "qwen3", **changes: Any) -> ModelFacts:
        values: dict[str, Any] = {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "tie_word_embeddings": False,
            "max_position_embeddings": 65536,
        }
        return facts_of_config(AutoConfig.for_model(model_type, **{**values, **changes}))

    return make


@pytest.fixture(scope="session")
def mixture(make_facts: Callable[..., ModelFacts]) -> ModelFacts:
    """A decoder with 8 experts, of which 2 are chosen."""
    return make_facts("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)


@pytest.fixture(scope="session")
def llama(make_facts: Callable[..., ModelFacts]) -> Callable[[str], ModelFacts]:
    """Llama 3.1 by its name: 8B, 70B or 405B."""
    shapes = {
        "8B": (4096, 14336, 32, 32),
        "70B": (8192, 28672, 80, 64),
        "405B": (16384, 53248, 126, 128),
    }
    made: dict[str, ModelFacts] = {}

    def find(name: str) -> ModelFacts:
        if name not in made:
            hidden, inner, layers, heads = shapes[name]
            made[name] = make_facts(
                "llama",
                vocab_size=128256,
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=8,
                head_dim=128,
            )
        return made[name]

    return find
