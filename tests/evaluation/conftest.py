"""A tiny chat model, made here: a trained byte-level BPE and random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from hearth.config.recipe import ModelSection
from hearth.data.tokenizer import train_bpe
from hearth.models import build_model, load_tokenizer, save_model

TEXT = [
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n",
    "The library opened at nine, and by ten every chair was taken.",
]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer, a chat template and random weights."""
    folder = tmp_path_factory.mktemp("models")
    train_bpe(TEXT * 50, 300).save(folder / "tokenizer", model_max_length=128)
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = build_model(
        ModelSection.model_validate({"size": "100K", "context_length": 128}),
        vocab_size=len(tokenizer),
        tokenizer=tokenizer,
        seed=0,
    )
    save_model(model, tokenizer, folder / "chat")
    return folder / "chat"
