"""LoRA through PEFT: put an adapter on a model, and merge it into plain weights at the end."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from hearth.config.recipe import AdapterSection
from hearth.errors import ConfigError
from hearth.models.reward_head import has_reward_head


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers: what ``target_modules`` may name."""
    kinds = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    return sorted(kinds)


def add_adapter(model: PreTrainedModel, section: AdapterSection, *, seed: int) -> PeftModel:
    """Freeze ``model`` and put a trainable LoRA adapter on it; its start depends on ``seed`` alone."""
    targets = section.target_modules
    config = LoraConfig(
        r=section.rank,
        lora_alpha=cast(Any, section.alpha),
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="SEQ_CLS" if has_reward_head(model) else "CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT still asks transformers by a name that transformers has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            torch.manual_seed(seed)
            return cast(PeftModel, get_peft_model(model, config))
    except ValueError as error:
        raise ConfigError(
            f"model.adapter.target_modules {_shown(targets)} matches no layer of the "
            f"{model.config.model_type} model: {error}",
            fix=f"use all-linear, or some of {', '.join(linear_names(model))}",
        ) from error


def _shown(targets: tuple[str, ...] | str) -> str:
    return targets if isinstance(targets, str) else "[" + ", ".join(targets) + "]"


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Plain weights with the adapter's update added; ``model`` is not usable as an adapter afterwards."""
    return cast(PreTrainedModel, model.merge_and_unload())


def save_adapter(model: PeftModel, directory: Path) -> None:
    """The adapter alone, in PEFT's format."""
    model.save_pretrained(str(directory))
