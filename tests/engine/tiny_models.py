"""Tiny random models of any family of transformers, from the family's own default config.

Used by census.py. What makes a model big is shrunk by the name of its config field; every kind of layer
stays.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB, LAYERS = 320, 4
MOST_PARAMETERS = 100_000_000

# Field name -> tiny value, in every config that has the field and sets it to a number.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"], VOCAB),
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "attention_hidden_size",
         "emb_dim", "dim", "lru_width"], 64,
    ),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "n_inner", "dim_ff", "dff", "d_ff", "decoder_ffn_dim",
         "encoder_ffn_dim", "ffn_hidden_size", "dense_intermediate_size", "intermediate_size_mlp"], 96,
    ),
    **dict.fromkeys(
        ["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
         "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size",
         "expert_ffn_hidden_size"], 32,
    ),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
         "num_encoder_layers", "num_decoder_layers"], LAYERS,
    ),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
         "swa_num_attention_heads"], 4,
    ),
    **dict.fromkeys(
        ["head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels", "attention_head_dim", "swa_head_dim",
         "dim_head", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "global_head_dim",
         "query_pre_attn_scalar", "mamba_d_head", "mamba_head_dim"], 16,
    ),
    **dict.fromkeys(["num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads"], 2),
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32, "kv_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2,
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"], 2,
    ),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group"], 1),
    **dict.fromkeys(
        ["sliding_window", "sliding_window_size", "attention_window_size", "window_size", "local_attention",
         "attention_chunk_size"], 8,
    ),
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"], 256,
    ),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size"], 8),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"], 2),
    **dict.fromkeys(["index_n_heads", "mamba_n_groups", "n_groups"], 2),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    "index_head_dim": 16, "index_topk": 8, "rotary_dim": 8,
}  # fmt: skip
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# What the general rule does not reach.
SIX_SHARED = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        **SIX_SHARED,
        "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jetmoe": {"tie_word_embeddings": False},  # tied, it repeats its input
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["hybrid"]},
}


def tiny_fields(config: PreTrainedConfig, model_type: str = "") -> dict[str, Any]:
    """Constructor arguments of the smallest config that still has every kind of layer of ``config``."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    tiny: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            tiny[name] = tiny_fields(value)
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            tiny[name] = min(value, SIZES[name])
        elif name in TOKEN_IDS:
            tiny[name] = TOKEN_IDS[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCAB:
            tiny[name] = VOCAB - 1
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if isinstance(kv_heads, int):
        tiny["num_key_value_heads"] = 4 if kv_heads == heads else min(2, kv_heads)
    if "head_dim" in tiny and fields["head_dim"] == fields.get("qk_rope_head_dim"):
        tiny["head_dim"] = tiny["qk_rope_head_dim"]  # DeepSeek's name for the dims that are rotated
    if "is_decoder" in fields:
        tiny["is_decoder"] = True  # BERT and its kin: causal only as a decoder
    tiny.update(_layer_lists(config, fields))
    tiny.update(EXCEPTIONS.get(model_type, {}))
    return tiny


def _layer_lists(config: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Per-layer lists cut to the first layer of each kind, and more until there are ``LAYERS``."""
    depth = fields.get("num_hidden_layers") or getattr(config, "num_hidden_layers", None)
    lists = {
        name: value for name, value in fields.items()
        if isinstance(value, list | tuple) and depth and len(value) == depth
        and not any(isinstance(v, float) for v in value)
    }  # fmt: skip
    if not lists or depth <= LAYERS:
        return {}
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    chosen = {kinds.index(kind) for kind in dict.fromkeys(kinds)}
    for layer in range(depth):
        if len(chosen) >= LAYERS:
            break
        chosen.add(layer)
    cut = {name: [value[i] for i in sorted(chosen)] for name, value in lists.items()}
    return {**cut, "num_hidden_layers": len(chosen)}


class NotTinyError(Exception):
    """A family that this census cannot build small."""


# Families whose config makes no language model that stands alone.
NOT_ALONE = {
    "gemma3n": "its vision tower needs timm and Pillow; gemma3n_text is its language model",
    "gemma4_assistant": "a drafter that reads the cache of another model",
    "gemma4_unified_assistant": "a drafter that reads the cache of another model",
    "musicgen": "writes codebooks of sound; its config holds three models and builds no decoder alone",
    "musicgen_melody": "writes codebooks of sound; its config holds three models and builds no decoder alone",
    "qwen4_exp": "its config leaves sizes of its text model open; qwen4_exp_text is its language model",
    "dots3_note": "its config checks the sizes of three towers against each other; dots3_note_text is its "
    "language model",
}


def make_tiny(family: str) -> PreTrainedModel:
    """A random model of ``family``; raises `NotTinyError` with the reason."""
    if family in NOT_ALONE:
        raise NotTinyError(NOT_ALONE[family])
    config_class = CONFIG_MAPPING[family]
    try:
        config = config_class(**tiny_fields(config_class(), family))
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        size = sum(parameter.numel() for parameter in empty.parameters())
        if size > MOST_PARAMETERS:
            raise NotTinyError(f"{size / 1e6:.0f} million parameters are left")
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    except NotTinyError:
        raise
    except Exception as error:
        raise NotTinyError(f"{type(error).__name__}: {error}") from error
    enliven(model)
    return model


@torch.no_grad()
def enliven(model: PreTrainedModel) -> None:
    """Give weight to what starts at zero or one, as a trained model has it: biases, sinks, gates, norms.

    At its usual initialisation a tiny model repeats itself, and what it adds as zero would pass unseen.
    """
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.any():
            parameter.mul_(3.0)
        else:  # little, or a bias alone would choose the token
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.05)
