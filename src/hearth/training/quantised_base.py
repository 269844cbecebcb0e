"""A frozen base in 8 or 4 bits under an adapter: QLoRA (Dettmers et al. 2023)."""

from __future__ import annotations

from typing import Any, Literal

from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hearth.errors import ConfigError
from hearth.models.quantised import QuantisedLinear
from hearth.training.float8 import ROUTERS

# Of the weights of the decoder layers, so much may be out of reach before it is not worth its name.
_LARGEST_REST = 0.5


class _LoraOnQuantised(LoraLinear):  # type: ignore[misc]
    """PEFT's layer, which would add an update to a weight that is only a result and gone right after."""

    def merge(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        raise ConfigError(
            "an adapter is not merged into quantised weights: what the steps of 4 or 8 bits round away is as "
            "large as the update",
            fix="merge it into the base as it was before, as hearth.training does",
        )


def quantise_base(model: nn.Module, kind: Literal["int8", "nf4"]) -> int:
    """Replace the linear layers inside of the decoder layers by quantised ones; how many there are.

    Embeddings, norms, routers and the output layer stay. Raises ConfigError for a model that has no such
    layers, that shares their weights, or most of whose weights are no linear layers.
    """
    found: dict[str, nn.Linear] = {}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    for prefix, layer in layers:
        for name, module in layer.named_modules():
            if type(module) is nn.Linear and name.rpartition(".")[2] not in ROUTERS:
                found[f"{prefix}.{name}"] = module
    _check(model, [layer for _, layer in layers], found, kind)
    for name, linear in found.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, QuantisedLinear(linear, kind))
    return len(found)


def _check(model: nn.Module, layers: list[nn.Module], found: dict[str, nn.Linear], kind: str) -> None:
    what = f"model.adapter.quantize {kind}: {type(model).__name__}"
    if not found:
        raise ConfigError(
            f"{what} has no linear layers in its decoder layers that could be quantised",
            fix="use quantize: none; models such as llama, qwen3, mistral and phi3 can be quantised",
        )
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, linear in found.items():
        shared = owners[id(linear.weight)]
        if len(shared) > 1:
            raise ConfigError(
                f"{what} uses one weight in several places ({', '.join(shared)}), and {name} cannot be "
                "quantised apart from the others",
                fix="use quantize: none",
            )
    weights = {n: w.numel() for layer in layers for n, w in layer.named_parameters() if w.dim() > 1}
    total = sum(w.numel() for layer in layers for w in layer.parameters() if w.dim() > 1)
    quantised = sum(linear.weight.numel() for linear in found.values())
    if quantised < (1 - _LARGEST_REST) * total:
        largest = max(weights, key=lambda name: weights[name])
        raise ConfigError(
            f"{what} keeps {1 - quantised / total:.0%} of the weights of its decoder layers outside of "
            f"linear layers (such as {largest}), so quantising would save little",
            fix="use quantize: none",
        )


def use_quantised_layers(config: LoraConfig) -> LoraConfig:
    """Let PEFT put layers on quantised ones that refuse to be merged."""
    config._register_custom_module({QuantisedLinear: _LoraOnQuantised})
    return config


def is_quantised(model: nn.Module) -> bool:
    """Whether any layer is quantised."""
    return any(isinstance(module, QuantisedLinear) for module in model.modules())
