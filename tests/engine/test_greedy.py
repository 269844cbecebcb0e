"""Greedy output equals transformers' own `generate`, token for token, for many families and every path."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from hearth.engine import Engine, SamplingParams

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "sliding_window": 12},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {},
    "olmo2": {},
    "starcoder2": {"sliding_window": 8},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 96},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "stablelm": {},
}  # fmt: skip
PROMPT_LENGTHS = (1, 5, 23, 40, 2)


def make_model(family: str) -> PreTrainedModel:
    fields = {**COMMON, **FAMILIES[family]}
    if family == "gpt2":
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):  # fmt: skip
            del fields[name]
    config = CONFIG_MAPPING[family](**fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # a tiny model at its usual initialisation repeats itself: make it livelier
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def make_prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, 320) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def reference(model: PreTrainedModel, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """transformers' greedy tokens, one prompt at a time."""
    result = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=2,
        )
        result.append(output[0, len(prompt) :].tolist())
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str) -> None:
    model = make_model(family)
    prompts = make_prompts()
    expected = reference(model, prompts, 48)
    assert len({tuple(tokens) for tokens in expected}) > 2, "the model says the same to everything"
    with Engine.from_model(model, max_num_batched_tokens=64) as engine:
        completions = engine.generate(prompts, SamplingParams(max_tokens=48, temperature=0))
        engine.scheduler.check()
    assert [c.token_ids for c in completions] == expected
