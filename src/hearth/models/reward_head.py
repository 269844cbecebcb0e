"""A causal language model turned into a reward model: the decoder, and a scalar head on the last token."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hearth.errors import UnsupportedModelError
from hearth.models.loading import quiet_transformers


def has_reward_head(model: Any) -> bool:
    """Whether it is a sequence classifier of one label with a linear ``score`` head, as reward models are."""
    score = getattr(model, "score", None)
    head = getattr(score, "original_module", score)  # PEFT wraps what it trains whole
    return isinstance(head, nn.Linear) and model.config.num_labels == 1


def with_reward_head(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """``AutoModelForSequenceClassification`` with one label, on the decoder of ``model``, which it takes.

    The head starts small and depends on ``seed`` alone. Raises UnsupportedModelError for an architecture
    whose classifier does not read the last token through a linear ``score``.
    """
    if has_reward_head(model):
        return model
    config = model.config
    config.num_labels = 1
    config.problem_type = "regression"
    kind = str(config.model_type)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        try:
            with torch.device("meta"):
                found: Any = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
        except (ValueError, KeyError, ImportError) as error:
            raise UnsupportedModelError(
                f"transformers has no sequence classifier for model_type {kind!r}", fix=_FIX
            ) from error
        if not has_reward_head(found) or type(found.base_model) is not type(model.base_model):
            raise UnsupportedModelError(
                f"the sequence classifier of model_type {kind!r} has no linear score head on the decoder",
                fix=_FIX,
            )
        # The decoder itself, so that buffers which no checkpoint holds come with it.
        setattr(found, found.base_model_prefix, model.base_model)
        head = nn.Linear(found.score.in_features, 1, bias=found.score.bias is not None, dtype=model.dtype)
        deviation = getattr(config.get_text_config(), "initializer_range", 0.02)
        nn.init.normal_(head.weight, std=deviation)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
        found.score = head.to(model.device)
    return cast(PreTrainedModel, found.train(model.training))


_FIX = "use a decoder such as llama, qwen3, mistral, gemma2, phi3 or gpt2"
