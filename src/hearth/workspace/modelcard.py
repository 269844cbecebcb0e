"""What a model directory says about itself, and the hearth.json that is written beside its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hearth.errors import ModelError
from hearth.workspace.artifacts import TreeFile, hash_file

if TYPE_CHECKING:
    from hearth.workspace.records import ModelVersion, Report

CARD = "hearth.json"
CARD_FORMAT = 1


def model_facts(directory: Path) -> dict[str, Any]:
    """Facts about a Hugging Face directory that need no weights.

    Keys: architecture, model_type, dtype, tokenizer_sha256, chat_template_sha256; None where there is none.
    Raises ModelError when the directory has neither config.json nor adapter_config.json.
    """
    config = _read_json(directory / "config.json")
    adapter = _read_json(directory / "adapter_config.json")
    if config is None and adapter is None:
        raise ModelError(
            f"{directory} is not a Hugging Face model directory: it has no config.json",
            fix="give the folder that holds config.json and the weights",
        )
    config = config or {}
    architectures = config.get("architectures") or [None]
    return {
        "architecture": architectures[0],
        "model_type": config.get("model_type"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "adapter_type": (adapter or {}).get("peft_type"),
        "tokenizer_sha256": _tokenizer_hash(directory),
        "chat_template_sha256": _chat_template_hash(directory),
    }


def declared_licence(directory: Path) -> str | None:
    """The `license:` of the model card's front matter (README.md), as Hugging Face writes it."""
    readme = directory / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    parts = text.split("---\n", 2)
    if not text.startswith("---\n") or len(parts) < 3:
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None


def _tokenizer_hash(directory: Path) -> str | None:
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        if (directory / name).is_file():
            return hash_file(directory / name)[0]
    return None


def _chat_template_hash(directory: Path) -> str | None:
    """The hash of the template's text, wherever it is kept: the file wins, as in transformers."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return hash_file(file)[0]
    template = (_read_json(directory / "tokenizer_config.json") or {}).get("chat_template")
    return hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def card(version: ModelVersion, files: Iterable[TreeFile], reports: Iterable[Report]) -> dict[str, Any]:
    """The content of hearth.json: everything that is known about a version."""
    return {
        "format": CARD_FORMAT,
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "files": {f.path: {"sha256": f.sha256, "size": f.size} for f in files},
        **{key: version.facts.get(key) for key in ("architecture", "model_type", "dtype")},
        "tokenizer_sha256": version.facts.get("tokenizer_sha256"),
        "chat_template_sha256": version.facts.get("chat_template_sha256"),
        "run": version.run_id,
        "recipe": version.recipe,
        "recipe_hash": version.recipe_hash,
        "dataset_fingerprint": version.dataset_fingerprint,
        "parent": version.parent,
        "licence": version.licence,
        "tags": version.tags,
        "aliases": list(version.aliases),
        "reports": [report.to_dict() for report in reports],
        "created_at": version.created_at.isoformat(),
        "created_by": version.created_by,
    }


def read_card(directory: Path) -> Mapping[str, Any] | None:
    """The hearth.json of a directory, or None. Raises ModelError when it is not one."""
    value = _read_json(directory / CARD)
    if value is None:
        return None
    if value.get("format") != CARD_FORMAT or not isinstance(value.get("files"), dict):
        raise ModelError(
            f"{directory / CARD} has the format {value.get('format')!r}; this Hearth reads {CARD_FORMAT}",
            fix="remove the file to import the directory without its history",
        )
    return value
