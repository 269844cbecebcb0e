"""A plain model directory from any checkpoint of a run.

A checkpoint holds what training changes. What never changes during a run is written once at its start, as
``RUN/skeleton``: configuration, tokenizer with its template, generation defaults, the shape of the adapter.
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from hearth.errors import ConfigError, IntegrityError, NotFoundError
from hearth.models import load_model, load_tokenizer, resolve_reference, save_model
from hearth.models.loading import quiet_transformers
from hearth.models.saving import replace_directory
from hearth.training.checkpoint.store import CheckpointStore
from hearth.training.identity import base_hash, shapes_hash, tokenizer_hash

if TYPE_CHECKING:
    from hearth.training.checkpoint.store import Checkpoint
    from hearth.workspace import Run, Workspace

_ADAPTER = "adapter_config.json"


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
    step: int | Literal["best", "latest"] = "latest",
    workspace: Workspace | None = None,
) -> Path:
    """Write a checkpoint of a run as a plain Hugging Face directory; an adapter is merged into its base.

    ``run``: a run or its id. The bytes of the checkpoint are verified first, and ``out_dir`` appears by one
    rename. Raises NotFoundError (no such run or checkpoint), IntegrityError (damaged, or another base than
    the adapter was trained on), ConfigError (something is at ``out_dir``), StorageError.
    """
    from hearth.workspace import Workspace

    target = Path(out_dir).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty", fix="name a directory that is not there yet")
    workspace = workspace or Workspace.open()
    found = workspace.runs.get(run) if isinstance(run, str) else run
    skeleton = found.dir / "skeleton"
    if not (skeleton / "config.json").is_file():
        raise NotFoundError(
            f"run {found.id} has no {skeleton.name} folder to build its model from",
            fix=f"resume it: `hearth train --resume {found.id}` writes it, and RUN/model at the end",
        )
    checkpoint = CheckpointStore(found.dir).find(step)
    tokenizer = load_tokenizer(skeleton) if (skeleton / "tokenizer.json").is_file() else None
    _require(checkpoint, "tokenizer", tokenizer_hash(tokenizer), f"the tokenizer in {skeleton}")
    if (skeleton / _ADAPTER).is_file():
        base = (found.recipe or {}).get("model", {}).get("base")
        model = _merged(checkpoint, skeleton, resolve_reference(base, workspace))
    else:
        model = _plain(checkpoint, skeleton)
    generation = None
    if (skeleton / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(skeleton)
    with torch.no_grad():
        save_model(model, tokenizer, target, generation)
    return target


def _plain(checkpoint: Checkpoint, skeleton: Path) -> Any:
    """The model of a checkpoint that holds all weights; no memory is spent on initial ones."""
    config = AutoConfig.from_pretrained(skeleton, local_files_only=True, trust_remote_code=False)
    model_class = getattr(transformers, config.architectures[0])
    with quiet_transformers(), torch.device("meta"):
        model = model_class(config)
    _require(checkpoint, "model", shapes_hash(model), f"the configuration in {skeleton}")
    weights = checkpoint.tensors["model"]
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, weight in model.named_parameters() if weight.is_meta]
    if empty:
        raise IntegrityError(f"checkpoint {checkpoint.path} has no weights for {empty[0]}")
    return model


def _merged(checkpoint: Checkpoint, skeleton: Path, base_dir: Path) -> nn.Module:
    """The base with the adapter of a checkpoint merged into its full-precision weights."""
    from peft import LoraConfig, get_peft_model

    from hearth.training.adapter import merge_adapter

    _require(checkpoint, "base", base_hash(base_dir), f"the base model {base_dir}")
    base = load_model(base_dir, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a deprecated name
        model = get_peft_model(base, LoraConfig.from_pretrained(str(skeleton)))
    _copy_into(model, checkpoint.tensors["model"], checkpoint)
    merged: nn.Module = merge_adapter(model)
    return merged


def _copy_into(model: nn.Module, weights: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if set(own) != set(weights):
        raise IntegrityError(f"checkpoint {checkpoint.path} holds an adapter of another shape")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


def _require(checkpoint: Checkpoint, field: str, value: str, what: str) -> None:
    saved = checkpoint.state["identity"][field]
    if saved != value:
        raise IntegrityError(
            f"{what} is not the one that checkpoint {checkpoint.path} was made with",
            fix="put back the files that the run was started with",
        )
