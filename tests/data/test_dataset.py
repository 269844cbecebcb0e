"""Opening a dataset: tokens, masks, provenance both ways, and every kind of damage."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hearth.config import Recipe
from hearth.data import Dataset, DataTokenizer, prepare_dataset, render_chat
from hearth.data.process import TokenResult
from hearth.data.shards import SplitWriter
from hearth.errors import DataError, IntegrityError, NotFoundError

Prepare = Callable[..., Dataset]


@pytest.fixture
def dataset(prepare: Prepare, corpus: Path) -> Dataset:
    return prepare(corpus)


def test_decoded_documents_are_the_source_texts(dataset: Dataset, corpus: Path) -> None:
    seen = 0
    for name in ("train", "validation"):
        split = dataset.split(name)
        assert split.num_documents == len(split) > 0
        texts = list(split.iter_text())
        for index, text in enumerate(texts):
            info = split.document_info(index)
            original = (corpus / str(info["id"])).read_text(encoding="utf-8")
            assert text == original
            assert info["bytes"] == split.byte_lengths[index] == len(original.encode())
            tokens = split.tokens(index)
            assert tokens.dtype == np.int32
            assert tokens[-1] == dataset.manifest.tokenizer.eos_token_id
            assert len(tokens) == split.lengths[index] == info["stop"] - info["start"]
            assert split.loss_mask(index) is None
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        assert split.num_tokens == split.lengths.sum()
        seen += len(texts)
    assert seen == 40


def test_held_out_bytes_can_be_written_for_other_compressors(dataset: Dataset, tmp_path: Path) -> None:
    split = dataset.split("validation")
    assert split.write_text(tmp_path / "held-out.txt") == split.num_bytes
    assert (tmp_path / "held-out.txt").read_bytes() == "".join(split.iter_text()).encode()


def test_documents_and_spans_lead_to_each_other(dataset: Dataset) -> None:
    split = dataset.split("train")
    for index in range(len(split)):
        info = split.document_info(index)
        for token in (info["start"], info["stop"] - 1):
            assert split.document_at(token) == index
        assert split.find(str(info["id"])) == [index]
        assert dataset.find(str(info["id"])) == [("train", index)]
    assert split.find("no such document") == []
    assert [split.document_at(0), split.document_at(split.num_tokens - 1)] == [0, len(split) - 1]


@pytest.mark.parametrize("index", [-1, 10_000])
def test_documents_and_tokens_out_of_range_are_refused(dataset: Dataset, index: int) -> None:
    split = dataset.split("train")
    for call in (split.tokens, split.document_info, split.text, split.loss_mask):
        with pytest.raises(NotFoundError, match=f"no document {index} in the train split"):
            call(index)
    with pytest.raises(NotFoundError, match="no token"):
        split.document_at(index * 1000)
    with pytest.raises(NotFoundError, match="no split 'test'"):
        dataset.split("test")
    with pytest.raises(NotFoundError, match="not a conversation"):
        split.messages(0)


def test_conversations_keep_messages_and_masks(
    prepare: Prepare, tokenizer: DataTokenizer, tokenizer_dir: Path, tmp_path: Path
) -> None:

    def turn(seed: int, number: int) -> list[dict[str, str]]:
        ask = {"role": "user", "content": f"question {seed} part {number}?"}
        return [ask, {"role": "assistant", "content": f"naïve café {seed} 米 " * (number + 1)}]

    talks = [[*turn(seed, 0), *(turn(seed, 1) if seed % 3 else [])] for seed in range(60)]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    dataset = prepare(path, tokenizer_dir=tokenizer_dir)
    split = dataset.split("train")
    assert split.is_chat
    supervised = 0
    for index in range(len(split)):
        messages = split.messages(index)
        assert messages in talks
        ids, mask = render_chat(messages, tokenizer)
        assert split.tokens(index).tolist() == ids.tolist()
        stored = split.loss_mask(index)
        assert stored is not None
        assert stored.tolist() == mask.tolist()
        assert split.text(index) == tokenizer.decode(ids.tolist())
        assert split.byte_lengths[index] == len(split.text(index).encode())
        supervised += int(mask.sum())
    assert split.num_supervised_tokens == supervised
    audit = dataset.manifest.audit
    assert audit is not None
    assert audit["num_conversations"] == 60
    assert audit["num_turns"] == sum(len(talk) // 2 for talk in talks)


def test_many_shards_read_like_one(dataset: Dataset, tmp_path: Path) -> None:
    """The same documents written with a shard for every few tokens, masks at odd bit positions."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 50)
    result = TokenResult(
        tokens=[rng.integers(0, 300, n).astype(np.int32) for n in lengths],
        masks=[rng.random(n) < 0.5 for n in lengths],
        num_bytes=lengths.tolist(),
        records=[{"source": 0, "id": f"d{n}", "messages": []} for n in range(50)],
    )
    copy = tmp_path / "sharded"
    shutil.copytree(dataset.path, copy)
    shutil.rmtree(copy / "train")
    files = dict(dataset.manifest.files)
    writer = SplitWriter(copy / "train", dtype="uint16", with_mask=True, files=files, shard_tokens=64)
    writer.add(result)
    record = writer.close()
    assert len(record.shards) > 5
    manifest = dataset.manifest.model_copy(update={"kind": "chat", "splits": {"train": record}})
    split = Dataset(copy, manifest).split("train")
    for index in range(50):
        assert split.tokens(index).tolist() == result.tokens[index].tolist()
        mask = split.loss_mask(index)
        assert mask is not None
        assert mask.tolist() == result.masks[index].tolist()


def test_a_large_vocabulary_takes_four_bytes(corpus: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [f"filler{n}" for n in range(70_000)] + ["<|endoftext|>"]
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "tok").mkdir()
    backend.save(str(tmp_path / "tok" / "tokenizer.json"))
    recipe = Recipe.model_validate({"data": {"sources": [{"path": str(corpus)}]}})
    dataset = prepare_dataset(recipe, tmp_path / "out", tokenizer_dir=tmp_path / "tok")
    assert dataset.manifest.dtype == "uint32"
    assert dataset.split("train").tokens(0)[-1] == 70_256
    assert dataset.split("train").text(0)


def test_a_split_travels_to_another_process_without_its_tokens(dataset: Dataset) -> None:
    split = dataset.split("train")
    split.tokens(0)
    data = pickle.dumps(split)
    assert len(data) < 20_000
    assert pickle.loads(data).tokens(3).tolist() == split.tokens(3).tolist()


def test_verify_names_the_file_with_a_flipped_byte(dataset: Dataset) -> None:
    dataset.verify()
    for name in ("train/tokens-00000.bin", "validation/offsets.bin", "tokenizer/tokenizer.json"):
        path = dataset.path / name
        original = path.read_bytes()
        path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        with pytest.raises(IntegrityError, match=f"{name} has sha256"):
            Dataset.open(dataset.path).verify()
        path.write_bytes(original)


def test_a_missing_or_short_file_is_noticed_at_once(dataset: Dataset) -> None:
    path = dataset.path / "train" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"damaged: train/tokens-00000\.bin has \d+ bytes"):
        Dataset.open(dataset.path)
    path.unlink()
    with pytest.raises(DataError, match=r"incomplete: train/tokens-00000\.bin is missing"):
        Dataset.open(dataset.path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "not a complete dataset: manifest.json is missing"),
        ("", "damaged"),
        ("{", "damaged"),
        ("{}", "damaged or of another version: fingerprint"),
        ("\udcff", "damaged"),
    ],
)
def test_a_broken_manifest_is_refused(dataset: Dataset, content: str | None, complaint: str) -> None:
    path = dataset.path / "manifest.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=complaint):
        Dataset.open(dataset.path)


def test_another_format_version_is_refused(dataset: Dataset) -> None:
    path = dataset.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(DataError, match="format version 99; this Hearth reads 3"):
        Dataset.open(dataset.path)


def test_no_such_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such dataset"):
        Dataset.open(tmp_path / "nothing")


def test_lineage_names_sources_with_their_content(dataset: Dataset) -> None:
    ((source, node, relation),) = dataset.lineage_edges
    assert source.startswith("source:")
    assert source.endswith("@" + dataset.manifest.sources[0].sha256[:12])
    assert (node, relation) == (f"dataset:{dataset.fingerprint}", "prepared")
