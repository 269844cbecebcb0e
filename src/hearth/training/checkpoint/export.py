"""A plain model directory from any checkpoint of a run.

A checkpoint holds what training changes. What never changes during a run is written once at its start, as
``RUN/skeleton``: configuration, tokenizer with its template, generation defaults, the shape of the adapter.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from hearth.config import Recipe
from hearth.errors import ConfigError, IntegrityError, NotFoundError
from hearth.models import load_model, load_tokenizer, resolve_reference, save_model
from hearth.models.loading import quiet_transformers
from hearth.models.pieces import are_written_one_by_one
from hearth.models.saving import replace_directory, saved_tensors
from hearth.training.checkpoint.store import CheckpointStore
from hearth.training.identity import base_hash, shapes_hash, tokenizer_hash
from hearth.training.objectives import make_objective
from hearth.training.progress import TrainingProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hearth.training.checkpoint.store import Checkpoint
    from hearth.workspace import Run, Workspace

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Exported:
    """What was written where."""

    directory: Path
    step: int


def write_skeleton(model: Any, tokenizer: Any, generation: GenerationConfig | None, directory: Path) -> None:
    """Everything of a model directory but the weights. ``model``: one of transformers, or of PEFT on top."""
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        plain = model.get_base_model() if hasattr(model, "peft_config") else model
        plain.config.architectures = [type(plain).__name__]
        with quiet_transformers():
            plain.config.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            if generation is not None:
                generation.save_pretrained(temporary)
            if plain is not model:
                model.peft_config[model.active_adapter].save_pretrained(temporary)
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_checkpoint(
    run: Run | str,
    out_dir: Path | str,
    *,
    step: int | str = "latest",
    workspace: Workspace | None = None,
    adapter_dir: Path | None = None,
) -> Exported:
    """Write a checkpoint of a run as a plain Hugging Face directory; an adapter is merged into its base.

    ``run``: a run or its id, it may go on meanwhile; ``step``: a step, ``best`` or ``latest``. The bytes
    of the checkpoint are verified first, and ``out_dir`` appears by one rename. ``adapter_dir``: where the
    adapter goes by itself, if there is one. Raises NotFoundError (no such
    run or checkpoint), IntegrityError (damaged, or another base than the adapter was trained on), ConfigError
    (something is at ``out_dir``), StorageError.
    """
    from hearth.workspace import Workspace

    target = Path(out_dir).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty", fix="name a directory that is not there yet")
    with contextlib.ExitStack() as stack:
        opened = workspace or stack.enter_context(Workspace.open())
        found = opened.runs.get(run) if isinstance(run, str) else run
        skeleton = found.dir / "skeleton"
        if not (skeleton / "config.json").is_file():
            raise NotFoundError(
                f"run {found.id} has no {skeleton.name} folder to build its model from",
                fix="only training runs have checkpoints: `hearth runs list --kind train` shows them",
            )
        say = TrainingProgress(first_step=0, total_steps=0, enabled=False)
        checkpoint = CheckpointStore(found.dir, warn=say.warn).find(step)
        tokenizer = load_tokenizer(skeleton) if (skeleton / "tokenizer.json").is_file() else None
        _require(checkpoint, "tokenizer", tokenizer_hash(tokenizer), f"the tokenizer in {skeleton}")
        if (skeleton / _ADAPTER).is_file():
            recipe = Recipe.model_validate(found.recipe)
            base_dir = resolve_reference(str(recipe.model.base), opened)
            _require(checkpoint, "base", base_hash(base_dir), f"the base model {base_dir}")
            # Some objectives train another head than that of the base.
            base = make_objective(recipe).adapt_model(load_model(base_dir, dtype=torch.float32))
            model, weights = _merged(checkpoint, skeleton, base, adapter_dir), None
        else:
            model, weights = _plain(checkpoint, skeleton)
    has_defaults = (skeleton / "generation_config.json").is_file()
    with torch.no_grad():
        generation = GenerationConfig.from_pretrained(skeleton) if has_defaults else None
        save_model(model, tokenizer, target, generation, weights=weights)
    return Exported(target, checkpoint.step)


def _plain(checkpoint: Checkpoint, skeleton: Path) -> tuple[Any, Mapping[str, Tensor] | None]:
    """The model of a checkpoint that holds all weights, and the weights, where they are still to be read.

    No memory is spent on initial ones, nor on more than is written at a time; but a few families have files
    that transformers must see a whole model to write.
    """
    config = AutoConfig.from_pretrained(skeleton, local_files_only=True, trust_remote_code=False)
    model_class = getattr(transformers, config.architectures[0])
    with quiet_transformers(), torch.device("meta"):
        model = model_class(config)
    _require(checkpoint, "model", shapes_hash(model), f"the configuration in {skeleton}")
    weights = _Final(checkpoint)
    absent = [name for name, _ in saved_tensors(model) if name not in weights]
    if absent:
        raise IntegrityError(f"checkpoint {checkpoint.path} has no weights for {absent[0]}")
    if are_written_one_by_one(model):
        return model, weights
    model.load_state_dict(dict(weights), strict=False, assign=True)
    model.tie_weights()
    return model, None


def _merged(
    checkpoint: Checkpoint, skeleton: Path, base: PreTrainedModel, adapter_dir: Path | None
) -> nn.Module:
    """The base with the adapter of a checkpoint merged into its full-precision weights."""
    from peft import LoraConfig

    from hearth.training.adapter import merged_into

    try:
        config = LoraConfig.from_pretrained(str(skeleton))
        merged: nn.Module = merged_into(base, config, dict(_Final(checkpoint)), adapter_dir)
    except ValueError as error:
        raise IntegrityError(f"checkpoint {checkpoint.path} does not fit its run: {error}") from error
    return merged


class _Final(Mapping[str, Tensor]):
    """The weights of a checkpoint, each read when it is asked for: their averages, where it has such."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._weights, self._averages = checkpoint.tensors["model"], checkpoint.tensors["average"]

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        return self._averages[name].to(weight.dtype) if name in self._averages else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _require(checkpoint: Checkpoint, field: str, value: str, what: str) -> None:
    saved = checkpoint.state["identity"][field]
    if saved != value:
        raise IntegrityError(
            f"{what} is not the one that checkpoint {checkpoint.path} was made with",
            fix="put back the files that the run was started with",
        )
