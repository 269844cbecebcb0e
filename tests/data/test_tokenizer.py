"""The trained tokenizer round-trips everything, opens in transformers, and does not depend on threads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from hearth.data import SPECIAL_TOKENS, Dataset, DataTokenizer, train_bpe
from hearth.errors import DataError

SAMPLES = [
    "Hello, world! It's 3.14 o'clock; don't you think?",
    "  indented\n\tcode = {'a': [1, 2]}\n\n\n    return x  \n",
    "naïve café \u2013 “quotes” … Ünïcödé, e\u0301, ﬁ",
    "日本語のテキスト、한국어, العربية, עברית, हिन्दी",
    "🙂 👩‍👩‍👧 🏳️‍🌈 \U0010ffff \x00\x01\x7f\r\n \u2028 \ufeff",
    "https://example.org/?q=1&r=2#x  1,000,000  aaaaaaaaaaaaaaaaaaaaaa",
]


@given(text=st.text(max_size=200))
@example(text="<|endoftext|> <|im_end|><|pad|>")
@example(text="\u2028 \ufeff\x00\x85\u00a0 \r\n\r")
def test_any_text_round_trips(text: str, tokenizer: DataTokenizer) -> None:
    (ids,) = tokenizer.encode_texts([text])
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())


def test_transformers_opens_it_with_the_same_ids(tokenizer: DataTokenizer, tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert theirs.eos_token == "<|endoftext|>"
    assert theirs.pad_token == "<|pad|>"
    assert theirs.model_max_length == 256
    assert len(theirs) == tokenizer.vocab_size
    for text, ids in zip(SAMPLES, tokenizer.encode_texts(SAMPLES), strict=True):
        assert theirs(text)["input_ids"] == ids == tokenizer.encode_prompt(text)
        assert theirs.decode(ids) == text
    assert DataTokenizer.from_transformers(theirs).stop_token_ids == tokenizer.stop_token_ids


def test_saved_files_open_as_the_same_tokenizer(tokenizer: DataTokenizer, tokenizer_dir: Path) -> None:
    opened = DataTokenizer.open(tokenizer_dir)
    assert opened.content_hash() == tokenizer.content_hash()
    assert [opened.special_ids[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert opened.stop_token_ids == {0, 3}
    assert json.loads((tokenizer_dir / "generation_config.json").read_text())["eos_token_id"] == [3, 0]


def test_gpt2_files_encode_like_transformers(shared_data: Path) -> None:
    from transformers import GPT2Tokenizer

    directory = shared_data / "gpt2_bpe"
    ours = DataTokenizer.open(directory)
    theirs = GPT2Tokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
    wiki = (shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:200_000]
    texts = [*SAMPLES, wiki]
    for text, ids in zip(texts, ours.encode_texts(texts), strict=True):
        assert ids == theirs(text)["input_ids"]
    assert ours.eos_id == 50256
    assert ours.vocab_size == 50257


_TRAIN = """
import hashlib, json, sys
from hearth.data import train_bpe
texts = json.load(sys.stdin)
print(hashlib.sha256(train_bpe(texts, 600).backend.to_str().encode()).hexdigest())
"""


def test_training_does_not_depend_on_threads() -> None:
    from random import Random

    rng = Random(0)
    texts = ["".join(rng.choice("abcde \n") for _ in range(400)) for _ in range(200)]
    hashes = set()
    for threads in ("1", "2", "4", "4"):
        result = subprocess.run(
            [sys.executable, "-c", _TRAIN],
            input=json.dumps(texts),
            env={**os.environ, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        hashes.add(result.stdout.strip())
    assert len(hashes) == 1


def test_the_smallest_vocabulary_is_bytes_and_specials() -> None:
    tokenizer = train_bpe(["ab ab ab"], 260)
    assert tokenizer.vocab_size == 260
    assert tokenizer.decode(tokenizer.encode_texts(["ab\u00e9"])[0]) == "ab\u00e9"


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        DataTokenizer.open(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": 1}'])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is not a usable tokenizer"):
        DataTokenizer.open(tmp_path)


def test_a_special_token_outside_the_vocabulary_is_refused(tmp_path: Path, tokenizer: DataTokenizer) -> None:
    tokenizer.save(tmp_path, model_max_length=8)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match="'</s>' is not in the vocabulary"):
        DataTokenizer.open(tmp_path)


def test_documents_begin_as_served_prompts_do(
    tokenizer: DataTokenizer,
    tokenizer_dir: Path,
    corpus: Path,
    prepare: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    """A Llama-style tokenizer puts BOS before a text; training without it would not be what is served."""
    from transformers import AutoTokenizer

    from hearth.models import encode_text

    directory = tmp_path / "with-bos"
    shutil.copytree(tokenizer_dir, directory)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    bos = tokenizer.special_ids["<|im_start|>"]
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", pair="$A $B", special_tokens=[("<|im_start|>", bos)]
    )
    backend.save(str(directory / "tokenizer.json"))
    assert tokenizer.prefix_ids == ()
    assert DataTokenizer.open(directory).prefix_ids == (bos,)
    split = prepare(corpus, tokenizer_dir=directory).split("validation")
    served = AutoTokenizer.from_pretrained(directory)
    assert split.num_documents > 3
    for index in range(split.num_documents):
        text = (corpus / split.document_info(index)["id"]).read_text(encoding="utf-8")
        assert split.tokens(index).tolist() == [*encode_text(served, text), tokenizer.eos_id]
        assert split.text(index) == text
    without = prepare(corpus, tokenizer_dir=tokenizer_dir, out="without").split("validation")
    assert without.num_tokens == split.num_tokens - split.num_documents
