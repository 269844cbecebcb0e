"""Models of many families give the same in parts as whole: losses, log-probabilities, logits, gradients."""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hearth.parallel.checks import TENSOR_FAMILIES

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
    "phi": {"resid_pdrop": 0.4},
    "phi3": {},
    "glm4": {},
    "olmo2": {},
    "cohere": {},
    "apertus": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 3.0},
    "starcoder2": {"sliding_window": None},
    "arcee": {},
    "cohere2": {},
    "ernie4_5": {},
    "exaone4": {},
    "gemma": {},
    "glm": {},
    "helium": {},
    "ministral": {},
    "ministral3": {},
    "nemotron": {},
    "olmo": {},
    "olmo3": {},
    "smollm3": {},
    "flex_olmo": MOE,
    "granitemoe": MOE,
    "minimax": MOE,
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
WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "cut": {"parallel": {}},
    "sequence": {"parallel": {"sequence": True}},
}
MODES: dict[str, dict[str, Any]] = {
    "one": {},
    "full": {"parallel": {}, "checkpointing": "full"},
    "selective": {"parallel": {}, "checkpointing": "selective"},
    "sequence full": {"parallel": {"sequence": True}, "checkpointing": "full"},
    "sequence selective": {"parallel": {"sequence": True}, "checkpointing": "selective"},
}
HALVES: dict[str, dict[str, Any]] = {
    "one": {"autocast": True},
    "cut": {"parallel": {}, "autocast": True},
    "sequence": {"parallel": {"sequence": True}, "autocast": True},
}


def case_of(name: str, ways: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"model": {**LLAMA, "model_type": name, **FAMILIES[name], **changes}, "ways": ways}


def results(launch: Any, folder: Path, cases: dict[str, Any], num: int = 2) -> dict[str, dict[str, Tensor]]:
    """Everything of a model, by case and way."""
    settings, out = folder / "settings.json", folder / "out.safetensors"
    settings.write_text(json.dumps({"parallel": {"tensor": num}, "cases": cases}))
    launch("tensor", num, [str(settings), str(out)], seconds=600)
    return by_way(out)


def by_way(path: Path) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in load_file(path).items():
        name, way, part = key.split(" | ")
        parts[f"{name} | {way}"][part] = value
    return parts


def differences(expected: dict[str, Tensor], got: dict[str, Tensor]) -> list[str]:
    assert got.keys() == expected.keys()
    return [
        f"{key}: {float((got[key] - value).abs().max()):.2e}"
        for key, value in expected.items()
        if not torch.allclose(got[key], value, rtol=1e-9, atol=1e-12)
    ]


def wrong(parts: dict[str, dict[str, Tensor]], cases: dict[str, Any]) -> dict[str, list[str]]:
    found = {
        f"{name} | {way}": differences(parts[f"{name} | one"], parts[f"{name} | {way}"])
        for name, case in cases.items()
        for way in case["ways"]
    }
    return {name: each for name, each in found.items() if each}


def test_what_is_allowed_is_what_is_compared() -> None:
    assert {case_of(name, {})["model"]["model_type"] for name in FAMILIES} == TENSOR_FAMILIES


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_families_give_the_same_in_parts(launch: Any, tmp_path: Path) -> None:
    cases = {name: case_of(name, WAYS) for name in FAMILIES}
    assert not wrong(results(launch, tmp_path, cases), cases)


@pytest.mark.slow
def test_what_is_run_again_exchanges_the_same(launch: Any, tmp_path: Path) -> None:
    cases = {name: case_of(name, MODES) for name in ("llama", "olmo2", "mixtral")}
    assert not wrong(results(launch, tmp_path, cases), cases)


@pytest.mark.slow
def test_a_process_may_have_no_words(launch: Any, tmp_path: Path) -> None:
    sizes = {"vocab_size": 5, "num_key_value_heads": 4, "pad_token_id": 3}
    cases = {name: case_of(name, WAYS, **sizes) for name in ("llama", "tied")}
    assert not wrong(results(launch, tmp_path, cases, num=4), cases)


@pytest.mark.slow
def test_autocast_rounds_no_more_in_parts(launch: Any, tmp_path: Path) -> None:
    parts = results(launch, tmp_path, {"llama": case_of("llama", HALVES)})
    for way in ("cut", "sequence"):
        for key, value in parts["llama | one"].items():
            if key.endswith("k_proj.bias"):
                continue  # next to nothing but rounding: attention hardly sees what all keys share
            # bfloat16 has 8 bits: sums of parts are rounded once more.
            error = (parts[f"llama | {way}"][key] - value).norm() / value.norm()
            assert error < 0.02, f"{way} {key}"


@pytest.mark.slow
def test_as_transformers_own_tensor_parallelism(launch: Any, tmp_path: Path) -> None:
    distributed = pytest.importorskip("transformers.distributed")
    if "tp_size" not in inspect.signature(distributed.DistributedConfig).parameters:
        pytest.skip("this version of transformers chooses its processes in another way")
    models = {name: case_of(name, {})["model"] for name in ("llama", "tied", "phi3", "glm4", "qwen3_moe")}
    settings, out = tmp_path / "settings.json", tmp_path / "out.safetensors"
    settings.write_text(json.dumps({"models": models}))
    launch("applier", 2, [str(settings), str(out)])
    parts = by_way(out)
    found = {name: differences(parts[f"{name} | theirs"], parts[f"{name} | ours"]) for name in models}
    assert not {name: each for name, each in found.items() if each}
