"""Tiny random models of many families, transformers' own answers, and a tokenizer trained on the spot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

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
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "sliding_window": 12},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 8,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": MIXED_LAYERS},
    "phi3": {},
    "olmo2": {},
    "starcoder2": {"sliding_window": 8},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "sliding_window": 8, "layer_types": MIXED_LAYERS},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 96},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "stablelm": {},
    "gemma": {"head_dim": 16},
    "cohere2": {"sliding_window": 8, "layer_types": MIXED_LAYERS},
    "glm4": {"head_dim": 16},
    "granite": {},
    "phi": {},
    "deepseek_v3": {  # latent attention: the dims of keys and values differ
        "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "head_dim": 8,
        "v_head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
    "gemma3n_text": {  # the last layers attend to keys and values of earlier ones
        "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3, "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0, 0.0], "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8, "laurel_rank": 8,
    },
    "longcat_flash": {  # two attentions a layer, and a router that reads a linear layer's weight
        "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "n_routed_experts": 4,
        "zero_expert_num": 2, "moe_topk": 2, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip
GPT2_HAS_OTHER_NAMES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings",
)  # fmt: skip


def make_model(family: str, **changes: Any) -> PreTrainedModel:
    fields = {**COMMON, **FAMILIES.get(family, {}), **changes}
    if family == "longcat_flash":
        del fields["num_hidden_layers"]
    if family == "gpt2":
        for name in GPT2_HAS_OTHER_NAMES:
            fields.pop(name, None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields)).eval()
    with torch.no_grad():  # at its usual initialisation a tiny model repeats itself: make it livelier
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def make_prompts(lengths: tuple[int, ...] = (1, 5, 23, 40, 2)) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, 320) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def generate_with_transformers(
    model: PreTrainedModel, prompts: list[list[int]], num_tokens: int, **settings: Any
) -> list[list[int]]:
    """transformers' greedy tokens, one prompt at a time."""
    result = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, **settings
        )
        result.append(output[0, len(prompt) :].tolist())
    return result


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 ids whose first three are pad, bos, eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [
        "the quick brown fox jumps over the lazy dog",
        "Grüße aus München, 日本語, 🎉🎉 the end of the day",
    ] * 20
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tokenizer, as files."""
    path = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def family_model() -> Any:
    return make_model


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return make_prompts()


@pytest.fixture(scope="session")
def transformers_tokens() -> Any:
    return generate_with_transformers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames and not any(
        "family" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("family", list(FAMILIES))
