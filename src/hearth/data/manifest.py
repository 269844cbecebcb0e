"""``manifest.json``: what a dataset is, what it was made from, and the hash of every file in it.

Written last, so a directory without it is not a dataset. It holds nothing that differs between two runs over
the same inputs: no times, no machine, no number of workers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hearth.errors import DataError

Kind = Literal["text", "chat", "preference", "feedback", "prompts"]

# A document of these kinds is a sample; each of its parts is a sequence of its own.
SAMPLE_PARTS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "feedback": ("completion",),
    "prompts": ("prompt",),
}

FORMAT_VERSION = 3
MANIFEST = "manifest.json"


def kind_of(source_format: str) -> Kind:
    """What the documents of a source are."""
    kinds: dict[str, Kind] = {
        "chat": "chat",
        "stdlib-chat": "chat",
        "preference": "preference",
        "feedback": "feedback",
        "prompts": "prompts",
    }
    return kinds.get(source_format, "text")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Count(_Record):
    """Documents and the UTF-8 bytes of their text."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, num_bytes: int) -> None:
        """Count more of them."""
        self.documents += documents
        self.bytes += num_bytes


class SourceRecord(_Record):
    """One source: what was read, what was removed and why, what was kept for each split."""

    path: str
    format: str
    license: str | None
    files: int
    sha256: str = Field(description="Over the names and contents of its files.")
    read: Count = Field(default_factory=Count)
    removed: dict[str, Count] = Field(default_factory=dict)
    bad: dict[str, int] = Field(default_factory=dict, description="Files or rows that are not text.")
    bad_examples: list[str] = Field(default_factory=list)
    kept: dict[str, Count] = Field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether its documents are conversations, or samples made of them."""
        return kind_of(self.format) != "text"


class Shard(_Record):
    """A flat array of token ids; ``mask`` is its loss mask, one bit a token, lowest bit first."""

    file: str
    mask: str | None
    tokens: int
    documents: int


class SplitRecord(_Record):
    """Train or validation."""

    documents: int
    tokens: int
    bytes: int
    supervised_tokens: int
    parts: int = Field(default=1, description="Sequences that each document holds one after the other.")
    shards: list[Shard]


class TokenizerRecord(_Record):
    """The tokenizer in ``tokenizer/``."""

    sha256: str = Field(description="Over vocabulary, merges, special tokens and chat template.")
    vocab_size: int
    eos_token_id: int | None
    pad_token_id: int | None
    trained: bool
    trained_on_bytes: int = 0
    round_trips_checked: int = 0
    round_trips_lossy: int = Field(0, description="Checked documents that do not decode to their text.")


class FileRecord(_Record):
    """Size and hash of a file of the dataset."""

    bytes: int
    sha256: str


class Manifest(_Record):
    """The whole description of a dataset directory."""

    format: Literal["hearth-dataset"] = "hearth-dataset"
    version: int = FORMAT_VERSION
    fingerprint: str = Field(description="sha256 over `inputs`: the same inputs give the same dataset.")
    kind: Kind
    dtype: Literal["uint16", "uint32"]
    inputs: dict[str, Any]
    versions: dict[str, str]
    sources: list[SourceRecord]
    tokenizer: TokenizerRecord
    split_fallback: bool = Field(
        description="The smallest group was held out: none fell below the threshold."
    )
    splits: dict[str, SplitRecord]
    audit: dict[str, int] | None
    files: dict[str, FileRecord]

    def removed(self) -> dict[str, Count]:
        """What each filter removed, over all sources."""
        total: dict[str, Count] = {}
        for source in self.sources:
            for reason, count in source.removed.items():
                total.setdefault(reason, Count()).add(count.documents, count.bytes)
        return total

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a dataset. Raises DataError when there is none or it is damaged."""
        path = directory / MANIFEST
        if not directory.is_dir():
            raise DataError(f"no such dataset: {directory}", fix="make it with `hearth data prepare RECIPE`")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise DataError(
                f"{directory} is not a complete dataset: {MANIFEST} is missing",
                fix="it is written last; delete the directory and run `hearth data prepare` again",
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is damaged: {error}", fix="prepare the dataset again") from error
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(
                f"{path} is damaged or of another version: {place}: {first['msg']}",
                fix="delete the directory and run `hearth data prepare` again",
            ) from error
        if manifest.version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {manifest.version}; this Hearth reads {FORMAT_VERSION}",
                fix="prepare the dataset again",
            )
        return manifest
