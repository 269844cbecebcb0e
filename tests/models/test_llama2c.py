"""llama2.c's format: the published golden text, and its own tokenizer algorithm."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hearth.errors import ModelError
from hearth.models import import_llama2c, load_model, load_tokenizer
from hearth.models.llama2c import convert_vocabulary, read_llama2c, read_llama2c_vocabulary


@pytest.mark.parametrize(
    ("num_tokens", "num_bytes", "digest"), [(200, 464, "beeb5cb46785"), (256, 565, "30b2ffb07967")]
)
def test_golden_text(stories: Path, num_tokens: int, num_bytes: int, digest: str) -> None:
    model, tokenizer = load_model(stories), load_tokenizer(stories)
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=num_tokens, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True).encode()
    assert len(text) == num_bytes
    assert hashlib.sha256(text).hexdigest().startswith(digest)


def reference_encode(entries: list[tuple[bytes, float]], text: str) -> list[int]:
    """llama2.c's encode() (run.c), line by line, with BOS."""
    lookup = {raw: index for index, (raw, _) in enumerate(entries)}
    tokens = [1]
    if text:
        tokens.append(lookup[b" "])
    for character in text:
        raw = character.encode()
        tokens += [lookup[raw]] if raw in lookup else [byte + 3 for byte in raw]
    while True:
        best_score, best_id, best_index = -1e10, -1, -1
        for index in range(len(tokens) - 1):
            merged = lookup.get(entries[tokens[index]][0] + entries[tokens[index + 1]][0])
            if merged is not None and entries[merged][1] > best_score:
                best_score, best_id, best_index = entries[merged][1], merged, index
        if best_index < 0:
            return tokens
        tokens[best_index : best_index + 2] = [best_id]


@pytest.fixture(scope="module")
def vocabulary(shared_data: Path) -> list[tuple[bytes, float]]:
    return read_llama2c_vocabulary(shared_data / "stories260K" / "tok512.bin", 512)


LETTERS = st.text(alphabet="abcdefghijklmnopqrstuvwxyz ,.'\n\"ABLT", max_size=60)
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\0"), max_size=20)


@settings(deadline=None, max_examples=150)
@given(text=LETTERS | ANY)
@example(text="")
@example(text="Once upon a time, there was a little girl named Lily.")
@example(text="aaaa bbbb  cc\n\nZoë 🎈 <s> </s> <0x41>")
@example(text=" leading and trailing ")
def test_encodes_like_llama2c(vocabulary: list[tuple[bytes, float]], text: str) -> None:
    tokenizer = convert_vocabulary(vocabulary)
    if any(special in text for special in ("<s>", "</s>", "<unk>")):
        # llama2.c has no notion of special tokens in a text; ours are tested with them taken out.
        text = text.replace("<s>", "").replace("</s>", "").replace("<unk>", "")
    assert tokenizer(text).input_ids == reference_encode(vocabulary, text)


def test_decoding_drops_one_leading_space(stories: Path) -> None:
    tokenizer = load_tokenizer(stories)
    for text in ("Hello there", " two", "naïve 🎈\n"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_truncated_model(shared_data: Path, tmp_path: Path) -> None:
    raw = (shared_data / "stories260K" / "stories260K.bin").read_bytes()
    (tmp_path / "m.bin").write_bytes(raw[:-10])
    with pytest.raises(ModelError, match=f"expected {len(raw)} bytes, found {len(raw) - 10}"):
        read_llama2c(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(raw + b"more")
    with pytest.raises(ModelError, match=f"expected {len(raw)} bytes, found {len(raw) + 4}"):
        read_llama2c(tmp_path / "m.bin")
    os.truncate(tmp_path / "m.bin", 5)
    with pytest.raises(ModelError, match=r"no llama2\.c model"):
        read_llama2c(tmp_path / "m.bin")


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"\x89PNG" + bytes(100))
    with pytest.raises(ModelError, match="impossible sizes"):
        read_llama2c(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(struct.pack("<7i", 0x616B3432, 1, 2, 3, 4, 5, 6))
    with pytest.raises(ModelError, match="versioned"):
        read_llama2c(tmp_path / "m.bin")
    with pytest.raises(ModelError, match="cannot read"):
        read_llama2c(tmp_path / "absent.bin")


def test_tokenizer_of_another_model(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "stories260K"
    raw = (source / "tok512.bin").read_bytes()
    (tmp_path / "t.bin").write_bytes(raw[:-1])
    with pytest.raises(ModelError, match="ends inside token 511"):
        import_llama2c(source / "stories260K.bin", tmp_path / "t.bin", tmp_path / "out")
    (tmp_path / "t.bin").write_bytes(raw[:4000])
    with pytest.raises(ModelError, match=r"ends inside|holds \d+ tokens, the model has 512"):
        import_llama2c(source / "stories260K.bin", tmp_path / "t.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_untied_output(tmp_path: Path) -> None:
    dim, hidden, layers, heads, vocab, context = 8, 16, 1, 2, 12, 4
    header = struct.pack("<7i", dim, hidden, layers, heads, heads, -vocab, context)
    weights = layers * (2 * dim + 4 * dim * dim + 3 * dim * hidden)
    count = vocab * dim + weights + dim + 2 * context * (dim // heads // 2) + vocab * dim
    values = torch.randn(count)
    (tmp_path / "m.bin").write_bytes(header + values.numpy().tobytes())
    model = read_llama2c(tmp_path / "m.bin")
    assert torch.equal(model.lm_head.weight.flatten(), values[-vocab * dim :])
    assert torch.equal(model.model.embed_tokens.weight.flatten(), values[: vocab * dim])
