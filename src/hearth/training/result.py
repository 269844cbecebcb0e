"""What a finished run leaves behind: a plain model directory, the adapter, a registered version."""

from __future__ import annotations

import copy
import shutil
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig

from hearth.config import recipe_hash, to_dict
from hearth.errors import IntegrityError
from hearth.models import load_model, resolve_reference, save_model
from hearth.models.saving import default_generation_config, replace_directory
from hearth.training.adapter import merge_adapter, save_adapter
from hearth.training.checkpoint.export import export_checkpoint
from hearth.training.identity import base_hash

if TYPE_CHECKING:
    from hearth.training.checkpoint import CheckpointStore
    from hearth.training.trainer import Trainer
    from hearth.workspace import Run, Workspace


def leave_result(trainer: Trainer, run: Run, workspace: Workspace, store: CheckpointStore) -> dict[str, Any]:
    """Write ``RUN/model`` (and ``RUN/adapter``), register it where the recipe says so; facts for the summary.

    The result has the last weights; with early stopping, those of the best evaluation; with
    ``train.ema_decay`` the average of the weights at that step.
    """
    if trainer.world.size > 1 or trainer.config.parallel.engine == "deepspeed":
        return trainer.world.on_main(lambda: _leave_from_checkpoint(trainer, run, workspace, store))
    config = trainer.config
    best = store.best()
    from_step = trainer.state.step
    if config.train.early_stopping_patience and best is not None:
        checkpoint = store.load(best)
        trainer.load_weights(checkpoint)
        from_step = checkpoint.step
    facts: dict[str, Any] = {"model_dir": str(run.dir / "model"), "model_step": from_step}
    if trainer.updates.average is not None:
        trainer.updates.average.copy_to_model()
    model: Any = trainer.model
    if config.model.adapter is not None:
        save_adapter(model, run.dir / "adapter")
        facts["adapter_dir"] = str(run.dir / "adapter")
        model = merge_adapter(model, lambda: _load_base(trainer, run, workspace))
    with torch.no_grad():
        save_model(model, trainer.tokenizer, run.dir / "model", generation_config_of(trainer, model))
    facts.update(_registered(trainer, run, workspace))
    return facts


def _leave_from_checkpoint(
    trainer: Trainer, run: Run, workspace: Workspace, store: CheckpointStore
) -> dict[str, Any]:
    """The same of weights that are spread over processes: they are all in the last checkpoint."""
    patient = trainer.config.train.early_stopping_patience and store.best() is not None
    step = "best" if patient else trainer.state.step
    fresh = run.dir / ".model.new"  # a run that is resumed at its end has a model already
    shutil.rmtree(fresh, ignore_errors=True)
    adapter_dir = None if trainer.config.model.adapter is None else run.dir / "adapter"
    written = export_checkpoint(run, fresh, step=step, workspace=workspace, adapter_dir=adapter_dir)
    replace_directory(fresh, run.dir / "model")
    facts: dict[str, Any] = {"model_dir": str(run.dir / "model"), "model_step": written.step}
    if adapter_dir is not None:
        facts["adapter_dir"] = str(adapter_dir)
    return facts | _registered(trainer, run, workspace)


def _registered(trainer: Trainer, run: Run, workspace: Workspace) -> dict[str, str]:
    """Register ``RUN/model``, where the recipe says so."""
    config = trainer.config
    if config.register_.name is not None:
        version = workspace.registry.create_version(
            config.register_.name,
            run.dir / "model",
            run_id=run.id,
            recipe=to_dict(config),
            recipe_hash=recipe_hash(config),
            dataset_fingerprint=trainer.dataset_fingerprint,
            parent=_parent(trainer, workspace),
            tags=dict(config.register_.tags),
        )
        return {"version": version.ref}
    return {}


def _load_base(trainer: Trainer, run: Run, workspace: Workspace) -> Any:
    """The base of an adapter as it was before training."""
    directory = resolve_reference(str(trainer.config.model.base), workspace)
    if base_hash(directory) != trainer.identity.base:
        raise IntegrityError(
            f"the base model {directory} is not the one that the adapter was trained on any more",
            fix=f"put back its files, then write the model with `hearth runs export {run.id}`",
        )
    return trainer.objective.adapt_model(load_model(directory, dtype=torch.float32))


def generation_config_of(trainer: Trainer, model: Any) -> GenerationConfig | None:
    """Generation defaults by the tokenizer; a base adds its own stop tokens and sampling defaults."""
    if trainer.tokenizer is None or not model.can_generate():
        return None
    by_tokenizer = default_generation_config(trainer.tokenizer)
    if trainer.config.model.base is None:
        return by_tokenizer
    kept = copy.deepcopy(model.generation_config)
    stops = [*_as_list(by_tokenizer.eos_token_id), *_as_list(kept.eos_token_id)]
    kept.eos_token_id = list(dict.fromkeys(stops)) or None
    kept.pad_token_id = by_tokenizer.pad_token_id
    return cast(GenerationConfig, kept)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _parent(trainer: Trainer, workspace: Workspace) -> str | None:
    """The version that training started from, when it is in the registry; a directory has no version."""
    from hearth.errors import NotFoundError

    if trainer.base_reference is None:
        return None
    try:
        return str(workspace.registry.get(trainer.base_reference).ref)
    except NotFoundError:
        return None
