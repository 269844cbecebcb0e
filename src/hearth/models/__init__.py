"""Open, build and save causal language models of transformers; sizes, arithmetic and model references."""

from hearth.models.building import build_model
from hearth.models.encoding import encode_chat, encode_text
from hearth.models.flops import flops_per_token, num_parameters, peak_flops
from hearth.models.info import ModelInfo, model_info
from hearth.models.llama2c import import_llama2c
from hearth.models.loading import check_model_directory, load_model, load_tokenizer, resolve_dtype
from hearth.models.reference import resolve_reference
from hearth.models.saving import default_generation_config, save_model, stop_token_ids
from hearth.models.sizes import config_for_size, format_count, parse_size

__all__ = [
    "ModelInfo",
    "build_model",
    "check_model_directory",
    "config_for_size",
    "default_generation_config",
    "encode_chat",
    "encode_text",
    "flops_per_token",
    "format_count",
    "import_llama2c",
    "load_model",
    "load_tokenizer",
    "model_info",
    "num_parameters",
    "parse_size",
    "peak_flops",
    "resolve_dtype",
    "resolve_reference",
    "save_model",
    "stop_token_ids",
]
