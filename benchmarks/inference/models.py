"""The models that the benchmark runs, made here: random weights, the same for everybody."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

from peers.install import PEERS, is_installed, python_of

SHAPES: dict[str, dict[str, Any]] = {
    "474M": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 32768,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
}
MAX_MODEL_LEN = 4096


def model_path(shape: str, directory: Path) -> Path:
    """The model's directory; made once, with weights from a fixed seed and no tokenizer."""
    path = directory / f"qwen3-{shape}"
    if not (path / "config.json").exists():
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        config = Qwen3Config(
            **SHAPES[shape],
            max_position_embeddings=MAX_MODEL_LEN,
            tie_word_embeddings=True,
            eos_token_id=None,
        )
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(path)
    return path


def with_tokenizer(model: Path) -> Path:
    """A directory beside the model with the same weights and a tokenizer, which HTTP servers ask for.

    Every id is one word ("t17 "), so that each token is a text of its own.
    """
    path = model.with_name(model.name + "-words")
    if not (path / "tokenizer.json").exists():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        path.mkdir(exist_ok=True)
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.Fuse()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="t0")
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            (path / name).unlink(missing_ok=True)
            (path / name).hardlink_to(model / name)
        tokenizer.save_pretrained(path)
    return path


def gguf_path(model: Path, kind: str) -> Path:
    """The model for llama.cpp: "bf16", "q8_0" or "q4_0"; made once, in llama.cpp's environment."""
    directory = model.with_name(model.name + "-gguf")
    path = directory / f"{kind}.gguf"
    if not path.exists() and is_installed("llamacpp"):
        converter = str(PEERS / "llamacpp" / "convert.py")
        subprocess.run(
            [str(python_of("llamacpp")), converter, str(model), str(directory)],
            check=True,
            capture_output=True,
        )
    return path


class Prompts:
    """Random prompts, fresh each time, the same sequence of them for a seed."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.vocab_size = vocab_size
        self._random = random.Random(seed)

    def __call__(self, batch: int, length: int) -> list[list[int]]:
        return [[self._random.randrange(3, self.vocab_size) for _ in range(length)] for _ in range(batch)]
