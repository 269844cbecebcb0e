"""A prepared dataset on disk: memory-mapped tokens, loss masks, and where every span came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from hearth.data.files import sha256_file
from hearth.data.manifest import Kind, Manifest, Shard, SplitRecord
from hearth.data.shards import id_hash
from hearth.data.tokenizer import DataTokenizer
from hearth.errors import DataError, IntegrityError, NotFoundError

TOKENIZER_DIRECTORY = "tokenizer"


class TokenSplit:
    """The documents of one split, in order. Opening is O(1); arrays are mapped when they are first read."""

    def __init__(self, dataset: Dataset, name: str, record: SplitRecord) -> None:
        self.dataset, self.name, self.record = dataset, name, record
        self.num_documents = record.documents
        self.num_tokens = record.tokens
        self.num_bytes = record.bytes
        self.num_supervised_tokens = record.supervised_tokens
        self._maps: dict[str, npt.NDArray[Any]] = {}
        self._tokenizer: DataTokenizer | None = None
        documents = np.cumsum([0, *(shard.documents for shard in record.shards)])
        self._first_documents: npt.NDArray[np.int64] = documents.astype(np.int64)
        self._first_tokens: npt.NDArray[np.int64] = np.cumsum(
            [0, *(shard.tokens for shard in record.shards)]
        ).astype(np.int64)

    def __len__(self) -> int:
        return self.num_documents

    @property
    def is_chat(self) -> bool:
        """Whether documents are conversations or samples made of them, so that they have loss masks."""
        return self.kind != "text"

    @property
    def kind(self) -> Kind:
        """What a document is: a text, a conversation, or a sample (preference, feedback, prompts)."""
        return self.dataset.manifest.kind

    @property
    def num_parts(self) -> int:
        """Sequences that a document holds: 2 for a comparison (chosen, rejected), else 1."""
        return self.record.parts

    @property
    def part_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each part of each document; [D, num_parts]."""
        if self.num_parts == 1:
            return self.lengths[:, None]
        return self._map("parts.bin", "int64").reshape(-1, self.num_parts)

    def parts(self, index: int) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        """Token ids and loss mask of each part of a document. Where every token counts, so says the mask."""
        tokens, mask = self.tokens(index), self.loss_mask(index)
        mask = np.ones(len(tokens), dtype=np.bool_) if mask is None else mask
        cuts = np.cumsum(self.part_lengths[index])[:-1]
        return list(zip(np.split(tokens, cuts), np.split(mask, cuts), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a copy of the file; the other process maps it again.
        return {**self.__dict__, "_maps": {}, "_tokenizer": None}

    def _map(self, name: str, dtype: str) -> npt.NDArray[Any]:
        if name not in self._maps:
            path = self.dataset.path / self.name / name
            size = path.stat().st_size
            self._maps[name] = (
                np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
                if size
                else np.zeros(0, dtype=dtype)
            )
        return self._maps[name]

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """First token of each document, counted over all shards, and the end of the last; [D + 1]."""
        return self._map("offsets.bin", "int64")

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, its end token included; [D]."""
        return np.diff(self.offsets)

    @property
    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of the text of each document; [D]."""
        return self._map("bytes.bin", "int64")

    @property
    def conversations(self) -> npt.NDArray[np.bool_]:
        """Which documents are conversations; the others are plain text. [D]"""
        formats = [source.is_chat for source in self.dataset.manifest.sources]
        chosen: npt.NDArray[np.bool_] = np.array(formats, dtype=np.bool_)[self._map("sources.bin", "int32")]
        return chosen

    def tokens(self, index: int) -> npt.NDArray[np.int32]:
        """Token ids of a document; a text begins as the tokenizer begins every text (BOS, if it adds one)
        and ends with the eos token."""
        return self.token_range(index, 0, self.length(index))

    def loss_mask(self, index: int) -> npt.NDArray[np.bool_] | None:
        """Which tokens of a document count in the loss; None when every token does."""
        return self.mask_range(index, 0, self.length(index))

    def token_range(self, index: int, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Tokens ``start`` to ``stop`` of a document."""
        shard, first = self._locate(index)
        ids = self._map(shard.file, self.dataset.manifest.dtype)
        return ids[first + start : first + stop].astype(np.int32)

    def mask_range(self, index: int, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """The loss mask of tokens ``start`` to ``stop`` of a document."""
        shard, first = self._locate(index)
        if shard.mask is None:
            return None
        begin, end = first + start, first + stop
        packed = self._map(shard.mask, "uint8")[begin // 8 : (end + 7) // 8]
        bits = np.unpackbits(packed, bitorder="little")
        return bits[begin % 8 : begin % 8 + end - begin].astype(np.bool_)

    def length(self, index: int) -> int:
        """Tokens of a document."""
        self._check(index)
        return int(self.offsets[index + 1] - self.offsets[index])

    def _check(self, index: int) -> None:
        if not 0 <= index < self.num_documents:
            raise NotFoundError(
                f"no document {index} in the {self.name} split of {self.dataset.path}",
                fix=f"it has {self.num_documents} documents, numbered from 0",
            )

    def _locate(self, index: int) -> tuple[Shard, int]:
        """Shard of a document and its first token there."""
        self._check(index)
        number = int(np.searchsorted(self._first_documents, index, side="right")) - 1
        return self.record.shards[number], int(self.offsets[index] - self._first_tokens[number])

    def document_info(self, index: int) -> dict[str, Any]:
        """Where a document came from: source, id, licence, bytes, its span of tokens, its messages.

        Of a sample, ``messages`` are the prompt, ``completions`` the answers, and ``fields`` what else is
        known: the ``label`` of feedback, the other columns of a prompt's row.
        """
        info = self._info(index)
        source = self.dataset.manifest.sources[info["source"]]
        return {**info, "source": source.path, "license": source.license}

    def _info(self, index: int) -> dict[str, Any]:
        self._check(index)
        lines = self._map("lines.bin", "int64")
        records = self._map("documents.jsonl", "uint8")
        info: dict[str, Any] = json.loads(records[int(lines[index]) : int(lines[index + 1])].tobytes())
        return info

    def document_at(self, token: int) -> int:
        """The document that holds a token, counted over all shards. O(log documents)."""
        if not 0 <= token < self.num_tokens:
            raise NotFoundError(
                f"no token {token} in the {self.name} split of {self.dataset.path}",
                fix=f"it has {self.num_tokens} tokens, numbered from 0",
            )
        return int(np.searchsorted(self.offsets, token, side="right")) - 1

    def find(self, document_id: str) -> list[int]:
        """The documents with an id; several sources may use the same. O(log documents)."""
        table = self._map("ids.bin", "uint64").reshape(-1, 2)
        wanted = np.uint64(id_hash(document_id))
        first = int(np.searchsorted(table[:, 0], wanted, side="left"))
        last = int(np.searchsorted(table[:, 0], wanted, side="right"))
        candidates: list[int] = table[first:last, 1].astype(np.int64).tolist()
        return [index for index in candidates if self.document_info(index)["id"] == document_id]

    def text(self, index: int) -> str:
        """The text of a document, decoded from its tokens; a conversation as its template renders it."""
        if self._tokenizer is None:
            self._tokenizer = self.dataset.tokenizer()
        ids = self.tokens(index).tolist()
        if not self._is_conversation(index):
            ids = ids[len(self._tokenizer.prefix_ids) : -1]  # without what was put around the text
        return self._tokenizer.decode(ids)

    def _is_conversation(self, index: int) -> bool:
        source = int(self._map("sources.bin", "int32")[index])
        return self.dataset.manifest.sources[source].is_chat

    def messages(self, index: int) -> list[dict[str, Any]]:
        """The messages of a conversation; of a sample, its prompt and its first answer.

        Raises NotFoundError for a plain text.
        """
        info = self._info(index)
        if "messages" not in info:
            raise NotFoundError(
                f"document {index} ({info['id']}) of {self.dataset.path} is a text, not a conversation",
                fix="read it with text()",
            )
        return [*info["messages"], *info.get("completions", [])[:1]]

    def iter_text(self) -> Iterator[str]:
        """The texts of all documents, in order."""
        for index in range(self.num_documents):
            yield self.text(index)

    def write_text(self, path: Path) -> int:
        """Write the texts of all documents one after the other, as UTF-8; the number of bytes written."""
        with path.open("wb") as stream:
            return sum(stream.write(text.encode()) for text in self.iter_text())


class Dataset:
    """A dataset directory. ``reused`` says that ``prepare_dataset`` found it ready; ``timings`` holds bytes
    and seconds of each stage when it was made just now."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.reused = False
        self.timings: dict[str, tuple[int, float]] = {}

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """Open a dataset and check the size of every file in it.

        Raises DataError when the directory is not a complete dataset or a file has another size than
        recorded. ``verify`` checks the contents as well.
        """
        path = Path(path)
        dataset = cls(path, Manifest.read(path))
        for name, record in dataset.manifest.files.items():
            file = path / name
            if not file.is_file():
                raise DataError(
                    f"dataset {path} is incomplete: {name} is missing",
                    fix="delete the directory and run `hearth data prepare` again",
                )
            size = file.stat().st_size
            if size != record.bytes:
                raise DataError(
                    f"dataset {path} is damaged: {name} has {size} bytes instead of {record.bytes}",
                    fix="delete the directory and run `hearth data prepare` again",
                )
        return dataset

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that decides the content."""
        return self.manifest.fingerprint

    @property
    def tokenizer_dir(self) -> Path:
        """Hugging Face tokenizer files."""
        return self.path / TOKENIZER_DIRECTORY

    @property
    def lineage_edges(self) -> list[tuple[str, str, str]]:
        """(source, this dataset, relation) for the lineage of a workspace; sources carry their hash."""
        node = f"dataset:{self.fingerprint}"
        return [
            (f"source:{quote(record.path, safe='/~')}@{record.sha256[:12]}", node, "prepared")
            for record in self.manifest.sources
        ]

    def tokenizer(self) -> DataTokenizer:
        """The tokenizer of the dataset."""
        return DataTokenizer.open(self.tokenizer_dir)

    def split(self, name: str) -> TokenSplit:
        """``train`` or ``validation``. Raises NotFoundError for any other name."""
        if name not in self.manifest.splits:
            raise NotFoundError(
                f"no split {name!r} in {self.path}", fix=f"use one of {', '.join(self.manifest.splits)}"
            )
        return TokenSplit(self, name, self.manifest.splits[name])

    def find(self, document_id: str) -> list[tuple[str, int]]:
        """(split, document) for every document with an id."""
        return [
            (name, index) for name in self.manifest.splits for index in self.split(name).find(document_id)
        ]

    def verify(self) -> None:
        """Hash every file. Raises IntegrityError naming the first that differs."""
        for name, record in self.manifest.files.items():
            digest = sha256_file(self.path / name)
            if digest != record.sha256:
                raise IntegrityError(
                    f"{self.path / name} has sha256 {digest[:16]}…; the manifest says {record.sha256[:16]}…",
                    fix="delete the dataset and run `hearth data prepare` again",
                )


def find_dataset(reference: str | Path, folder: Path) -> Path:
    """The directory of a dataset: a path, or a name or the beginning of a fingerprint in ``folder``.

    Raises NotFoundError naming what ``folder`` has.
    """
    path = Path(reference).expanduser()
    if path.exists():
        return path
    names = sorted(item.parent.name for item in folder.glob("*/manifest.json"))
    text = str(reference)
    matching = [text] if text in names else [name for name in names if text and name.startswith(text[:16])]
    if len(matching) == 1:
        return folder / matching[0]
    raise NotFoundError(
        f"no dataset {reference}: it is neither a directory nor in {folder}",
        fix=f"the workspace has {', '.join(names)}"
        if names
        else "make one with `hearth data prepare RECIPE`",
    )
