"""A recipe with its data inputs resolved, and the fingerprint that names the dataset it makes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from hearth.config.recipe import Recipe
from hearth.data.fim import FIM_TOKENS, FimTokens
from hearth.data.manifest import FORMAT_VERSION, SAMPLE_PARTS, Kind
from hearth.data.progress import NullProgress, Progress
from hearth.data.sources import Source, resolve_sources
from hearth.data.tokenizer import DataTokenizer, tokenizers_version
from hearth.data.training_copies import copy_text, find_copy
from hearth.errors import DataError


@dataclass(frozen=True)
class Job:
    """A recipe with its sources and tokenizer resolved; ``fingerprint`` names the dataset it makes."""

    recipe: Recipe
    sources: tuple[Source, ...]
    tokenizer: DataTokenizer | None  # None: one is trained
    inputs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 over the canonical JSON of ``inputs``."""
        return sha256(json.dumps(self.inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def kind(self) -> Kind:
        """Of the samples, when its sources hold samples; chat when any holds conversations."""
        kinds = {source.kind for source in self.sources}
        return next(iter(kinds - {"text", "chat"}), "chat" if "chat" in kinds else "text")


def plan_job(
    recipe: Recipe, *, tokenizer_dir: Path | str | None = None, progress: Progress | None = None
) -> Job:
    """Resolve and hash the inputs of a recipe; reads every source once, writes nothing."""
    sources = tuple(resolve_sources(recipe.data.sources, progress or NullProgress()))
    _check_kinds(sources)
    tokenizer = _given_tokenizer(recipe, tokenizer_dir)
    data = recipe.data
    if tokenizer is None:
        tokenizer_inputs: dict[str, Any] = {
            "vocab_size": recipe.tokenizer.vocab_size,
            "sample_mb": recipe.tokenizer.sample_mb,
            "tokenizers": tokenizers_version(),
            "model_max_length": recipe.model.context_length,
        }
        if data.fim is not None:
            tokenizer_inputs["more_special_tokens"] = list(FIM_TOKENS)
    else:
        if data.fim is not None:
            FimTokens.find(tokenizer)
        tokenizer_inputs = {"sha256": tokenizer.content_hash(), **_training_copy(tokenizer, sources)}
    inputs = {
        "format": FORMAT_VERSION,
        "sources": [source.fingerprint() for source in sources],
        "filters": data.filters.model_dump(mode="json"),
        "deduplicate": data.deduplicate,
        "on_bad_file": data.on_bad_file,
        "validation_fraction": data.validation_fraction,
        "seed": data.seed,
        "tokenizer": tokenizer_inputs,
    }
    return Job(recipe, sources, tokenizer, inputs)


def _training_copy(tokenizer: DataTokenizer, sources: tuple[Source, ...]) -> dict[str, str]:
    """The copy of the chat template that the loss masks are made with, if any: it decides the content too."""
    if all(source.kind == "text" for source in sources) or not tokenizer.chat_template:
        return {}
    template = tokenizer.template
    copy = None if template.has_generation_marks else find_copy(template)
    if copy is None:
        return {}
    return {"training_copy": copy, "training_copy_sha256": sha256(copy_text(copy).encode()).hexdigest()}


def _check_kinds(sources: tuple[Source, ...]) -> None:
    """Samples are counted one by one and texts by the row: they cannot be in one dataset."""
    for source in sources:
        other = next((other for other in sources if other.kind != source.kind), None)
        if source.kind in SAMPLE_PARTS and other is not None:
            raise DataError(
                f"data.sources mixes {source.kind} ({source.section.path}) with {other.kind} "
                f"({other.section.path})",
                fix="make two recipes: an objective reads samples of one kind",
            )


def _given_tokenizer(recipe: Recipe, tokenizer_dir: Path | str | None) -> DataTokenizer | None:
    if tokenizer_dir is None:
        base = recipe.tokenizer.base or recipe.model.base
        if base is None:
            return None
        if not Path(base).expanduser().is_dir():
            key = "tokenizer.base" if recipe.tokenizer.base else "model.base"
            raise DataError(
                f"{key} is {base!r}, which is not a directory",
                fix="name a directory with tokenizer files, or resolve the reference and pass tokenizer_dir",
            )
        tokenizer_dir = Path(base).expanduser()
    tokenizer = DataTokenizer.open(tokenizer_dir)
    if tokenizer.eos_id is None:
        raise DataError(
            f"the tokenizer in {tokenizer_dir} has no eos token, so documents could not be told apart",
            fix="set eos_token in its tokenizer_config.json",
        )
    return tokenizer
