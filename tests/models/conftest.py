"""Small real models for the tests of the models room."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hearth.models import config_for_size, import_llama2c, save_model
from hearth.models.building import model_from_config

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and the special tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    inner = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )


@pytest.fixture
def model() -> PreTrainedModel:
    """A quarter of a million random weights."""
    return model_from_config(config_for_size("250K", "qwen3", 320, 128), seed=3)


@pytest.fixture
def model_dir(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The model, saved."""
    save_model(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a Hugging Face directory."""
    out = tmp_path_factory.mktemp("stories") / "stories260K"
    source = shared_data / "stories260K"
    import_llama2c(source / "stories260K.bin", source / "tok512.bin", out)
    return out
