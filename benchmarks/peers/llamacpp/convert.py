"""A Qwen3 model directory as GGUF files for llama.cpp: bf16, and Q8_0 and Q4_0 by llama.cpp's own quantiser.

    python convert.py MODEL_DIRECTORY OUTPUT_DIRECTORY

The model has no tokenizer, and the file says so ("no_vocab"): prompts and answers are token ids.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm"}
QUANTISED = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of transformers; `KeyError` for one that this model does not have."""
    name = name.removeprefix("model.")
    if not name.startswith("layers."):
        return OTHER_NAMES[name.removesuffix(".weight")] + ".weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def bf16_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and bits (uint16) of each tensor of a safetensors file: a JSON header, then raw bytes."""
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(header_size))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + header_size)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}; only bf16 checkpoints are converted")
        start, end = entry["data_offsets"]
        yield name, data[start:end].view(np.uint16).reshape(entry["shape"])


def write_bf16(model: Path, output: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "qwen3" or not config["tie_word_embeddings"]:
        raise ValueError("only Qwen3 models with tied embeddings are converted")
    writer = gguf.GGUFWriter(output, "qwen3")
    writer.add_name(model.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, bits in bf16_tensors(model / "model.safetensors"):
        if bits.ndim == 1:  # llama.cpp keeps norms in float32
            writer.add_tensor(gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(
                gguf_name(name), np.ascontiguousarray(bits), raw_dtype=gguf.GGMLQuantizationType.BF16
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, output: Path, file_type: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.allow_requantize = True  # bf16 counts as quantised
    params.nthread = 0
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(params))
    if failed:
        raise RuntimeError(f"llama.cpp could not quantise {source.name} to {output.name}")


def convert(model: Path, directory: Path) -> None:
    """Write the files that are missing. A file appears under its name when it is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    bf16 = directory / "bf16.gguf"
    for path in (bf16, *(directory / f"{name}.gguf" for name in QUANTISED)):
        if path.exists():
            continue
        print(f"writing {path.name}", file=sys.stderr)
        temporary = path.with_suffix(".part")
        if path == bf16:
            write_bf16(model, temporary)
        else:
            quantise(bf16, temporary, QUANTISED[path.stem])
        temporary.rename(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    convert(arguments.model, arguments.output)
