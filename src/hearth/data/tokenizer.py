"""The tokenizer as the data pipeline sees it: text to ids and back, special tokens, chat template.

Works on ``tokenizers`` alone, so worker processes start without torch. Files are those of Hugging Face:
``tokenizer.json`` (or GPT-2's ``vocab.json`` and ``merges.txt``), ``tokenizer_config.json``,
``special_tokens_map.json``, ``chat_template.jinja`` and ``generation_config.json``.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from hearth.data.template import CHATML_TEMPLATE, ChatTemplate, compiled_template
from hearth.errors import DataError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, TURN_START, TURN_END)

# Tokens that end a turn in the templates in common use; they stop generation beside the eos token.
TURN_ENDS = (TURN_END, "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "<turn|>")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class DataTokenizer:
    """A loaded tokenizer. ``directory`` is where its files are, None when made in memory."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_token: str | None,
        pad_token: str | None,
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
        stop_token_ids: Iterable[int] = (),
        directory: Path | None = None,
    ) -> None:
        self.backend = tokenizer
        # Text of documents never becomes a control token, even where it spells one.
        self._plain = copy.deepcopy(tokenizer)
        self._plain.encode_special_tokens = True
        self._plain.no_truncation()
        self._plain.no_padding()
        self.directory = directory
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.eos_token, self.pad_token = eos_token, pad_token
        self.eos_id = self._id(eos_token)
        self.pad_id = self._id(pad_token)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_ids: dict[str, int] = {
            token.content: index
            for index, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        # What the tokenizer itself puts before a text, such as Llama's BOS. A served prompt begins with it
        # (``encode_prompt``), so a document has to as well.
        added = self._plain.encode("a", add_special_tokens=True)
        first_of_text = added.special_tokens_mask.index(0) if 0 in added.special_tokens_mask else 0
        self.prefix_ids: tuple[int, ...] = tuple(added.ids[:first_of_text])
        turn_ends = {self.special_ids[token] for token in TURN_ENDS if token in self.special_ids}
        eos = set() if self.eos_id is None else {self.eos_id}
        self.stop_token_ids: frozenset[int] = frozenset(stop_token_ids) | eos | turn_ends

    def _id(self, token: str | None) -> int | None:
        if token is None:
            return None
        index: int | None = self.backend.token_to_id(token)
        if index is None:
            raise DataError(
                f"special token {token!r} is not in the vocabulary of the tokenizer"
                + (f" in {self.directory}" if self.directory else ""),
                fix="correct tokenizer_config.json, or add the token to the tokenizer",
            )
        return index

    @property
    def template(self) -> ChatTemplate:
        """The chat template. Raises DataError when the tokenizer has none."""
        if not self.chat_template:
            raise DataError(
                "the tokenizer has no chat template" + (f": {self.directory}" if self.directory else ""),
                fix="copy the tokenizer files into a folder, add a chat_template.jinja that marks the "
                "assistant's words by {% generation %} … {% endgeneration %}, and name the folder as "
                "tokenizer.base",
            )
        return compiled_template(self.chat_template, self.special_tokens)

    @property
    def bytes_per_token_id(self) -> int:
        """Bytes that hold one id: 2 up to 65,536 entries, else 4."""
        return 2 if self.vocab_size <= 1 << 16 else 4

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts, without special tokens; text that spells a special token stays text."""
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt as serving encodes it: special tokens in the text count, bos is added if it is."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=True).ids
        return ids

    def encode_rendered(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of rendered chat text, as serving encodes it, and the span of characters of each."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text

    def content_hash(self) -> str:
        """sha256 over what decides the ids: the tokenizer, its special tokens and the chat template."""
        digest = hashlib.sha256()
        for part in (
            json.dumps(json.loads(self.backend.to_str()), sort_keys=True),
            json.dumps([self.eos_token, self.pad_token, self.special_tokens], sort_keys=True),
            self.chat_template or "",
        ):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.encode())
        return digest.hexdigest()

    @classmethod
    def open(cls, directory: Path | str) -> DataTokenizer:
        """Read the tokenizer files of a directory. Raises DataError naming what is missing or broken."""
        directory = Path(directory)
        config = _read_json(directory / "tokenizer_config.json")
        special_map = _read_json(directory / "special_tokens_map.json")
        generation = _read_json(directory / "generation_config.json")
        tokens = {
            key: _token_text(value)
            for source in (special_map, config)
            for key, value in source.items()
            if key.endswith("_token") and isinstance(value, str | dict)
        }
        backend = _read_backend(directory)
        template_path = directory / "chat_template.jinja"
        template = template_path.read_text(encoding="utf-8") if template_path.is_file() else None
        if template is None and isinstance(config.get("chat_template"), str):
            template = config["chat_template"]
        eos = tokens.get("eos_token")
        if eos is None and backend.token_to_id(END_OF_TEXT) is not None:
            eos = END_OF_TEXT
        stops = generation.get("eos_token_id", [])
        return cls(
            backend,
            eos_token=eos,
            pad_token=tokens.get("pad_token"),
            chat_template=template,
            special_tokens=tokens,
            stop_token_ids=[stops] if isinstance(stops, int) else stops or [],
            directory=directory,
        )

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> DataTokenizer:
        """The same from a fast tokenizer of transformers."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library",
                fix="load it with AutoTokenizer.from_pretrained, which gives a fast tokenizer",
            )
        template = tokenizer.chat_template
        return cls(
            backend,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            chat_template=template if isinstance(template, str) else None,
            special_tokens={k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
        )

    def save(self, directory: Path, *, model_max_length: int) -> None:
        """Write Hugging Face tokenizer files that ``AutoTokenizer.from_pretrained`` opens."""
        directory.mkdir(parents=True, exist_ok=True)
        # Written by us: the library's own save reports a full disk as a bare Exception.
        text: str = self.backend.to_str(pretty=False)
        (directory / "tokenizer.json").write_text(text, encoding="utf-8", newline="\n")
        tokens = {**self.special_tokens}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model_max_length,
            "clean_up_tokenization_spaces": False,
            **tokens,
        }
        _write_json(directory / "tokenizer_config.json", config)
        _write_json(directory / "special_tokens_map.json", tokens)
        generation = {"eos_token_id": sorted(self.stop_token_ids, reverse=True), "pad_token_id": self.pad_id}
        _write_json(directory / "generation_config.json", generation)
        if self.chat_template:
            (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8", newline="\n")


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, more_special_tokens: Sequence[str] = ()
) -> DataTokenizer:
    """Train a byte-level BPE: any text round-trips, bytes are the alphabet, GPT-2's split into words.

    The same texts give the same tokenizer on any number of threads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[
            AddedToken(token, special=True, normalized=False)
            for token in (*SPECIAL_TOKENS, *more_special_tokens)
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return DataTokenizer(
        tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        chat_template=CHATML_TEMPLATE,
        special_tokens={"eos_token": END_OF_TEXT, "pad_token": PAD},
    )


def tokenizers_version() -> str:
    """Version of the tokenizers library."""
    version: str = tokenizers.__version__
    return version


def _read_backend(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        if vocab.is_file() and merges.is_file():
            return _gpt2_backend(vocab, merges)
    except Exception as error:
        broken = path if path.is_file() else vocab
        raise DataError(
            f"{broken} is not a usable tokenizer: {error}", fix="save the tokenizer again"
        ) from error
    raise DataError(
        f"no tokenizer in {directory}: tokenizer.json is missing",
        fix="name a directory that holds tokenizer.json (or vocab.json and merges.txt)",
    )


def _gpt2_backend(vocab: Path, merges: Path) -> Tokenizer:
    """GPT-2's files: byte-level BPE without prefix space."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}", fix="save the tokenizer again") from error
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _token_text(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else str(value["content"])
