"""From a recipe to the parts of a trainer: data, tokenizer, model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.config import Recipe
from hearth.errors import ConfigError
from hearth.models import build_model, load_tokenizer, resolve_reference
from hearth.models.in_parts import InParts, build_in_parts
from hearth.training.adapter import add_adapter
from hearth.training.objectives import Objective, make_objective

if TYPE_CHECKING:
    from hearth.data import Dataset
    from hearth.workspace import Workspace


@dataclass(frozen=True)
class Parts:
    """What ``Trainer.from_recipe`` needs."""

    workspace: Workspace
    dataset: Dataset
    tokenizer: Any
    model: Any
    has_validation: bool
    base_reference: str | None
    in_parts: InParts | None = None  # of a model without memory: where its weights are


def assemble(recipe: Recipe, *, workspace: Workspace | None, progress: bool, in_parts: bool = False) -> Parts:
    """Prepare the data, open the tokenizer, build the model. Raises InputError for what cannot work.

    ``in_parts``: without memory for the weights, where the model and the objective allow it.
    """
    from hearth.workspace import Workspace

    workspace = workspace or Workspace.open()
    objective = make_objective(recipe)
    base_dir = None if recipe.model.base is None else resolve_reference(recipe.model.base, workspace)
    dataset = open_dataset(recipe, workspace, base_dir, progress=progress)
    dataset = objective.adapt_dataset(dataset, workspace, progress=progress)
    tokenizer = choose_tokenizer(dataset, base_dir)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "tokenizer": tokenizer,
        "seed": recipe.train.seed,
        "workspace": workspace,
    }
    parts = None
    if in_parts and _may_be_in_parts(recipe, objective):
        parts = build_in_parts(recipe.model, **settings)
    model: Any = build_model(recipe.model, **settings) if parts is None else parts.model
    _check_length(recipe, model)
    model = objective.adapt_model(model)
    if recipe.model.adapter is not None:
        model = add_adapter(model, recipe.model.adapter, seed=recipe.train.seed)
    has_validation = dataset.split("validation").num_documents > 0
    # A directory wins over a name, so a folder called like a registered model has no version behind it.
    is_folder = base_dir is not None and base_dir == Path(str(recipe.model.base)).expanduser()
    reference = None if is_folder else recipe.model.base
    return Parts(workspace, dataset, tokenizer, model, has_validation, reference, parts)


def _may_be_in_parts(recipe: Recipe, objective: Objective) -> bool:
    """Whether nothing but the family looks at the weights before the model is spread."""
    adapter = recipe.model.adapter
    plain = adapter is None or (adapter.quantize == "none" and not adapter.dora)
    return plain and type(objective).adapt_model is Objective.adapt_model


def open_dataset(recipe: Recipe, workspace: Workspace, base_dir: Path | None, *, progress: bool) -> Dataset:
    """The dataset of ``data.dataset``, or of ``data.sources`` prepared in the workspace and reused there."""
    from hearth.data import Dataset, find_dataset, prepare_in_folder

    if recipe.data.dataset is not None:
        return Dataset.open(find_dataset(recipe.data.dataset, workspace.root / "datasets"))
    if not recipe.data.sources:
        raise ConfigError(
            "the recipe has no data", fix="give data.sources, or data.dataset with a prepared dataset"
        )
    tokenizer_dir = _tokenizer_dir(recipe, workspace, base_dir)
    from hearth.training.preparing import PreparationProgress

    with PreparationProgress(enabled=progress) as shown:
        folder = workspace.root / "datasets"
        dataset = prepare_in_folder(recipe, folder, tokenizer_dir=tokenizer_dir, progress=shown)
    workspace.lineage.add_many(dataset.lineage_edges)
    return dataset


def _tokenizer_dir(recipe: Recipe, workspace: Workspace, base_dir: Path | None) -> Path | None:
    base = recipe.tokenizer.base
    if base is None:
        return base_dir
    if (Path(base).expanduser() / "tokenizer.json").is_file():
        return Path(base).expanduser()
    return resolve_reference(base, workspace)


def choose_tokenizer(dataset: Dataset, base_dir: Path | None) -> Any:
    """The tokenizer that goes with the model: that of the base, with its template; else the dataset's.

    A model trained on conversations keeps the template that rendered them, and a base without a template
    takes over the dataset's. Raises ConfigError when the two tokenizers number the tokens differently.
    """
    tokenizer = load_tokenizer(dataset.tokenizer_dir)
    if base_dir is None:
        return tokenizer
    base = load_tokenizer(base_dir)
    if base.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"the dataset was made with another tokenizer ({len(tokenizer)} tokens) than that of model.base "
            f"({len(base)} tokens)",
            fix="prepare the data with the tokenizer of the base: leave tokenizer.base out",
        )
    if dataset.manifest.kind != "text" or base.chat_template is None:
        return tokenizer
    return base


def _check_length(recipe: Recipe, model: Any) -> None:
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if longest is not None and recipe.data.sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length {recipe.data.sequence_length} exceeds the model's context of {longest}",
            fix=f"use at most {longest}",
        )
