"""Small corpora and a way to prepare them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from hearth.config import Recipe
from hearth.data import Dataset, DataTokenizer, prepare_dataset, train_bpe

# Examples share session fixtures, whose first use imports libraries: a deadline would measure that.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

WORDS = (
    "the quick brown fox jumps over a lazy dog while naïve café owners count 12 345 grains of 米".split()  # noqa: SIM905 - reads better
)


def make_text(seed: int, num_words: int = 60) -> str:
    """Some words in lines and paragraphs."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", "\n", ".\n\n"]) for _ in range(num_words))


@pytest.fixture(scope="session")
def tokenizer() -> DataTokenizer:
    """A small byte-level BPE with a ChatML template."""
    return train_bpe([make_text(seed, 300) for seed in range(20)], 400)


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer: DataTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as Hugging Face files."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(directory, model_max_length=256)
    return directory


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 40 text files in two levels."""
    root = tmp_path / "corpus"
    for number in range(40):
        path = root / ("a" if number % 2 else "b") / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make_text(number), encoding="utf-8")
    return root


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Dataset]:
    """``prepare(source, …)``: a dataset from one source; keyword arguments are keys of the data section."""

    def make(source: str | Path | dict[str, Any], *, out: str = "dataset", **options: Any) -> Dataset:
        tokenizer_dir = options.pop("tokenizer_dir", None)
        vocab_size = options.pop("vocab_size", 400)
        section = source if isinstance(source, dict) else {"path": str(source)}
        data = {"sources": [section], "validation_fraction": 0.2, **options}
        recipe = Recipe.model_validate({"data": data, "tokenizer": {"vocab_size": vocab_size}})
        return prepare_dataset(recipe, tmp_path / out, tokenizer_dir=tokenizer_dir)

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """``write_jsonl(rows, name)``: a JSONL file."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
