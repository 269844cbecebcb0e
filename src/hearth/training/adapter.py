"""LoRA, DoRA and QLoRA through PEFT: put an adapter on a model, and merge it into plain weights at the end.

Hu et al. 2021 (LoRA), Liu et al. 2024 (DoRA), Dettmers et al. 2023 (QLoRA).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hearth.config.recipe import AdapterSection
from hearth.errors import ConfigError
from hearth.models.reward_head import has_reward_head
from hearth.training.quantised_base import is_quantised, quantise_base, use_quantised_layers

_LINEAR = (nn.Linear, Conv1D)


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers: what ``target_modules`` may name."""
    kinds = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    return sorted(kinds)


def add_adapter(model: PreTrainedModel, section: AdapterSection, *, seed: int) -> PeftModel:
    """Freeze ``model`` and put a trainable adapter on it; its start depends on ``seed`` alone.

    With ``quantize`` the frozen weights are quantised first, in place. Raises ConfigError for targets that
    the model does not have or that cannot be changed alone, and for a model that cannot be quantised.
    """
    targets = section.target_modules
    if not isinstance(targets, str):
        _check_targets(model, targets)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=cast(Any, section.alpha),
        lora_dropout=section.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=section.dora,
        task_type="SEQ_CLS" if has_reward_head(model) else "CAUSAL_LM",
    )
    if any(isinstance(module, Conv1D) for module in model.modules()):
        config.fan_in_fan_out = True  # GPT-2 stores its matrices the other way round
    if section.quantize != "none":
        quantise_base(model, section.quantize)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = wrap(model, config)
            if not section.dora:  # whose start depends on the weights
                _draw(wrapped)
            return wrapped
    except ValueError as error:
        raise ConfigError(
            f"model.adapter: PEFT refuses it for the {model.config.model_type} model: {error}",
            fix=f"target some of {', '.join(linear_names(model))}",
        ) from error


def _draw(model: PeftModel) -> None:
    """Draw the adapter once more, in the memory of the host: PEFT puts it where the base is, if anywhere."""
    name = model.active_adapter
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for part in (layer.lora_A, layer.lora_B):
                if name in part and part[name].weight.is_meta:
                    part[name].to_empty(device="cpu")
            layer.reset_lora_parameters(name, True)


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """PEFT passes over a name that matches nothing while another one does."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, _LINEAR)}
    matched = {t: [n for n in linears if n == t or n.endswith(f".{t}")] for t in targets}
    absent = [target for target in targets if not matched[target]]
    if absent or not targets:
        raise ConfigError(
            f"model.adapter.target_modules [{', '.join(absent)}] matches no layer of the "
            f"{model.config.model_type} model",
            fix=f"use all-linear, or some of {', '.join(linear_names(model))}",
        )
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    for target, names in matched.items():
        if any(linears[name].weight is embedding for name in names):
            raise ConfigError(
                f"model.adapter.target_modules has {target}, whose weight is that of the input embedding: "
                "merging an update of one would change the other",
                fix=f"leave {target} out",
            )


def wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with new adapter layers as ``config`` describes them."""
    if is_quantised(model):
        config = use_quantised_layers(config)
    with warnings.catch_warnings():
        # PEFT still asks transformers by a name that transformers has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        return cast(PeftModel, get_peft_model(model, config))


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """What trains of a model with an adapter, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def merge_adapter(model: PeftModel, load_base: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Plain weights with the adapter's update added; ``model`` is not usable as an adapter afterwards.

    An adapter on a quantised base is merged into the weights as they were before, which ``load_base`` gives:
    merged into 4 bits, most of the update would be rounded away.
    """
    if not is_quantised(model):
        return cast(PreTrainedModel, model.merge_and_unload())
    config = model.peft_config[model.active_adapter]
    return merged_into(load_base(), config, adapter_weights(model))


def merged_into(
    base: PreTrainedModel,
    config: LoraConfig,
    weights: Mapping[str, Tensor],
    adapter_dir: Path | None = None,
) -> PreTrainedModel:
    """``base``, changed in place, with an adapter of these weights merged into it.

    ``adapter_dir``: where to save the adapter, too. Raises ValueError where names or shapes are not those
    that ``config`` leads to.
    """
    model = wrap(base, config)
    own = adapter_weights(model)
    if {name: weight.shape for name, weight in own.items()} != {n: w.shape for n, w in weights.items()}:
        raise ValueError("the adapter has other weights than its configuration says")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])
    if adapter_dir is not None:
        save_adapter(model, adapter_dir)
    return cast(PreTrainedModel, model.merge_and_unload())


def save_adapter(model: PeftModel, directory: Path) -> None:
    """The adapter alone, in PEFT's format."""
    model.save_pretrained(str(directory))
