"""Build the model that a recipe's ``model`` section describes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hearth.config.recipe import ModelSection
from hearth.errors import ConfigError, UnsupportedModelError
from hearth.models.initialising import initialise
from hearth.models.loading import load_model, quiet_transformers
from hearth.models.reference import resolve_reference
from hearth.models.sizes import config_for_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hearth.workspace import Workspace

DEFAULT_SIZE = "10M"


def config_for_section(section: ModelSection, *, vocab_size: int) -> PreTrainedConfig:
    """The configuration of a model that starts from random weights (``size`` or ``config``)."""
    if section.config is None:
        return config_for_size(
            section.size or DEFAULT_SIZE, section.architecture, vocab_size, section.context_length
        )
    values = copy.deepcopy(section.config)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ConfigError("model.config has no model_type", fix="name one, such as model_type: qwen3")
    given = values.setdefault("vocab_size", vocab_size)
    if not isinstance(given, int) or given < vocab_size:
        raise ConfigError(
            f"model.config.vocab_size {given} is smaller than the tokenizer's {vocab_size} tokens",
            fix="leave it out, or make it at least as large",
        )
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.config is not a valid {model_type} configuration: {error}") from error


def build_model(
    section: ModelSection,
    *,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    workspace: Workspace | None = None,
) -> PreTrainedModel:
    """The model of a recipe in float32: opened from ``base``, or new from ``size`` or ``config``.

    New weights depend on ``seed`` alone and leave the global random state as it was. ``tokenizer`` gives
    the special token ids of a new model. Raises ``ConfigError`` or ``ModelError``.
    """
    if section.base is not None:
        model = load_model(resolve_reference(section.base, workspace), dtype=torch.float32)
        require_embeddings(model, vocab_size, section.base)
        return model
    config = config_for_section(section, vocab_size=vocab_size)
    return model_from_config(with_special_tokens(config, tokenizer), seed=seed)


def model_from_config(config: Any, *, seed: int = 0) -> PreTrainedModel:
    """A new float32 model; its weights depend on ``seed`` alone, the global random state stays."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (ValueError, KeyError, ImportError) as error:
            raise UnsupportedModelError(
                f"model_type {config.model_type!r} cannot be built as a causal language model: {error}"
            ) from error
    # As it would be drawn in parts, by processes of which none has all of it.
    initialise(model, seed)
    return cast(PreTrainedModel, model)


def require_embeddings(model: PreTrainedModel, vocab_size: int, base: str) -> None:
    """Raise ConfigError for a tokenizer that has more tokens than the model."""
    rows = model.get_input_embeddings().weight.shape[0]
    if vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens, model.base {base!r} only {rows} embeddings",
            fix="use the tokenizer of the base model",
        )


def with_special_tokens(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """The configuration, with the ids of a tokenizer's special tokens."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id") if tokenizer is not None else ():
        setattr(config, key, getattr(tokenizer, key))
    return config
