"""What must be the same for a checkpoint to continue a run."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hearth.errors import ConfigError
from hearth.models import resolve_reference
from hearth.version import __version__

if TYPE_CHECKING:
    from hearth.config.recipe import Recipe, TrainSection
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
    "packing": ("how rows are made", "keep data.sequence_length, data.packing, data.truncate and data.seed"),
    "optimizer": ("train.optimizer", "keep the optimizer, or start a new run from the model"),
    "base": ("model.base", "resume with the base of the run: the checkpoint holds the adapter alone"),
    "adapter": ("model.adapter", "keep the adapter section of the recipe"),
    "seed": ("train.seed", "keep it: the order of the data follows from it"),
}

_INEXACT = ("precision", "micro_batch_size", "device", "processes", "torch", "transformers")
_WATCHING = ("evaluate_every", "evaluate_rows", "log_every", "profile_steps", "max_skipped_steps")
# A base is recognised by this many bytes at this many places of each of its files.
_SAMPLE_BYTES, _NUM_SAMPLES = 4096, 256


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
    packing: str
    optimizer: str
    base: str  # what an adapter was put on; "none" where the checkpoint holds all weights
    adapter: str
    recipe_hash: str
    # These may differ: the run goes on correctly, but not bit for bit as it would have.
    precision: str
    micro_batch_size: int | str
    device: str
    processes: str
    settings: Mapping[str, Any]  # those of train that decide what is learnt, by key

    def as_dict(self) -> dict[str, Any]:
        """For the checkpoint, with the versions of the libraries."""
        versions = {
            "hearth": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        return {"identity": asdict(self), "versions": versions}

    def inexact(self, checkpoint: Checkpoint) -> list[str]:
        """What differs that is allowed, but after which a run does not go on bit for bit as it would have."""
        saved = {**checkpoint.state["identity"], **checkpoint.state["versions"]}
        now = {**asdict(self), **self.as_dict()["versions"]}
        settings = saved["settings"]
        pairs = [(name, saved.get(name), now[name]) for name in _INEXACT]
        pairs += [(f"train.{key}", settings.get(key), value) for key, value in self.settings.items()]
        return [f"{name} ({then} then, {value} now)" for name, then, value in pairs if then != value]

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

    config = trainer.config
    data, train, adapter = config.data, config.train, config.model.adapter
    base = "none"
    if adapter is not None:
        base = base_hash(resolve_reference(str(config.model.base), trainer.workspace))
    return Identity(
        dataset=trainer.dataset_fingerprint + getattr(trainer.rows, "identity", ""),
        rows=len(trainer.rows),
        tokenizer=tokenizer_hash(trainer.tokenizer),
        model=trainer.facts.shapes,
        objective=train.objective,
        batch_size=train.batch_size,
        seed=train.seed,
        packing=f"{data.sequence_length}/{data.packing}/{data.truncate}/{data.seed}",
        optimizer=train.optimizer,
        base=base,
        adapter="none" if adapter is None else adapter.model_dump_json(),
        recipe_hash=recipe_hash(config),
        precision=trainer.precision,
        micro_batch_size=config.train.micro_batch_size,  # what auto has found is in the checkpoint
        device=trainer.device.type,
        processes=str(trainer.world.layout),
        settings=_settings(train),
    )


def _settings(train: TrainSection) -> dict[str, Any]:
    """The values of ``train`` by key, without what other fields hold and what only watches."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    left_out = {*_WATCHING, *_MEANINGS, *_INEXACT}
    return {key: value for key, value in flat(train.model_dump(mode="json")) if key not in left_out}


def common_facts(recipe: Recipe) -> dict[str, str]:
    """What processes that train together must have in common, by what a message calls it."""
    from hearth.config import recipe_hash

    return {
        "the recipe": recipe_hash(recipe),
        "the version of Hearth": __version__,
        "the version of torch": torch.__version__,
        "the version of transformers": transformers.__version__,
    }


def shapes_hash(model: Any) -> str:
    """SHA-256 of the names and shapes of all weights, but for those that no model directory has."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    shapes = {name: list(weight.shape) for name, weight in model.named_parameters() if name not in ignored}
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def base_hash(directory: Path) -> str:
    """SHA-256 of the weight files of a model directory, by their sizes and evenly spaced samples of them.

    A base of many gigabytes is recognised in an instant; in a fine-tuned version most of them differ.
    """
    digest = hashlib.sha256()
    for path in sorted(p for pattern in ("*.safetensors", "*.bin") for p in directory.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_SAMPLE_BYTES, size // _NUM_SAMPLES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary and how it splits text; "none" without a tokenizer."""
    if tokenizer is None:
        return "none"
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
