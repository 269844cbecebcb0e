"""What must be the same for a checkpoint to continue a run."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hearth.errors import ConfigError
from hearth.version import __version__

if TYPE_CHECKING:
    from hearth.training.checkpoint import Checkpoint
    from hearth.training.trainer import Trainer

# Field → how a message calls it, and what to do about a difference.
_MEANINGS = {
    "dataset": ("the dataset", "resume with the data of the run, or start a new run from its model"),
    "rows": ("the number of training rows", "keep data.sequence_length, data.packing and data.seed"),
    "tokenizer": ("the tokenizer", "resume with the tokenizer of the run"),
    "model": ("the shape of the model", "keep the model section of the recipe"),
    "objective": ("train.objective", "keep the objective, or start a new run from the model"),
    "batch_size": ("train.batch_size", "keep it: the position in the data counts in steps of that many rows"),
    "seed": ("train.seed", "keep it: the order of the data follows from it"),
}


@dataclass(frozen=True)
class Identity:
    """Fingerprints of everything that decides what the next step computes."""

    dataset: str
    rows: int
    tokenizer: str
    model: str
    objective: str
    batch_size: int
    seed: int
    recipe_hash: str

    def as_dict(self) -> dict[str, Any]:
        """For the checkpoint, with the versions of the libraries."""
        versions = {
            "hearth": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        return {"identity": asdict(self), "versions": versions}

    def require_match(self, checkpoint: Checkpoint) -> None:
        """Raise ConfigError that names what differs. A changed number of steps or rate is allowed."""
        saved = checkpoint.state["identity"]
        differing = [name for name in _MEANINGS if saved.get(name) != getattr(self, name)]
        if not differing:
            return
        whats = [
            f"{_MEANINGS[name][0]} ({_short(saved.get(name))} then, {_short(getattr(self, name))} now)"
            for name in differing
        ]
        raise ConfigError(
            f"checkpoint {checkpoint.path} cannot be resumed: {', '.join(whats)} differs",
            fix=_MEANINGS[differing[0]][1],
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "…"


def identity_of(trainer: Trainer) -> Identity:
    """The identity of what a trainer is about to do."""
    from hearth.config import recipe_hash

    shapes = {name: list(weight.shape) for name, weight in trainer.model.named_parameters()}
    return Identity(
        dataset=trainer.dataset_fingerprint,
        rows=len(trainer.rows),
        tokenizer=tokenizer_hash(trainer.tokenizer),
        model=hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest(),
        objective=trainer.config.train.objective,
        batch_size=trainer.config.train.batch_size,
        seed=trainer.config.train.seed,
        recipe_hash=recipe_hash(trainer.config),
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary and how it splits text; "none" without a tokenizer."""
    if tokenizer is None:
        return "none"
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
