"""Models of many families give the same in parts as whole: losses, log-probabilities, logits, gradients."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 65,  # does not divide by 2
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "mlp_bias": True,
    "pad_token_id": 40,  # has no gradient
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
# What the plans differ in: matrices packed into one, outputs that are gathered, norms after the products or
# of all heads, biases, caps and scales of logits, layers side by side, routers, shared experts, latents.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {},
    "glm4": {},
    "olmo2": {},
    "cohere": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 3.0},
    "starcoder2": {"sliding_window": None},
    "mixtral": MOE,
    "olmoe": MOE,
    "qwen3_moe": {**MOE, "norm_topk_prob": True},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 20, "norm_topk_prob": True},
    "glm4_moe": {
        **MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "deepseek_v3": {
        **MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "head_dim": 4,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
}
WAYS: dict[str, dict[str, Any]] = {"one": {}, "cut": {}, "sequence": {"sequence": True}}


def results(launch: Any, folder: Path, names: list[str], num: int = 2) -> dict[str, dict[str, Tensor]]:
    settings, out = folder / "settings.json", folder / "out.safetensors"
    cases = {
        name: {"model": {**LLAMA, "model_type": name, **FAMILIES[name]}, "parallel": WAYS} for name in names
    }
    settings.write_text(json.dumps({"parallel": {"tensor": num}, "cases": cases}))
    launch("tensor", num, [str(settings), str(out)])
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in load_file(out).items():
        name, way, part = key.split(" | ")
        parts[f"{name} | {way}"][part] = value
    return parts


@pytest.mark.slow
def test_families_give_the_same_in_parts(launch: Any, tmp_path: Path) -> None:
    parts = results(launch, tmp_path, list(FAMILIES))
    wrong = []
    for name in FAMILIES:
        expected = parts[f"{name} | one"]
        for way in ("cut", "sequence"):
            got = parts[f"{name} | {way}"]
            assert got.keys() == expected.keys()
            wrong += [
                f"{name} {way} {key}: {float((got[key] - value).abs().max()):.2e}"
                for key, value in expected.items()
                if not torch.allclose(got[key], value, rtol=1e-9, atol=1e-12)
            ]
    assert not wrong
