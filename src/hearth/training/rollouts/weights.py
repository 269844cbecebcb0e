"""The weights of a model that trains, under the names and in the form of a plain transformers model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hearth.errors import UnsupportedModelError
from hearth.models.quantised import QuantisedLinear
from hearth.parallel.tensor import gathered
from hearth.training.loss import unwrap


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names of the model without its adapter; where there is one, its update is added.

    Quantised weights are given as what they stand for. What is unchanged is not copied. What never is saved,
    such as a value head, is left out. Of weights that are spread over processes each gets the whole; all must
    ask.
    """
    inner = unwrap(model)
    ignored = set(getattr(inner, "_keys_to_ignore_on_save", None) or ())
    adapted = {name: module for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}
    found: dict[str, Tensor] = {}
    for name, module in inner.named_modules(remove_duplicate=False):
        if any(name == layer or name.startswith(f"{layer}.") for layer in adapted):
            continue
        prefix = f"{name}." if name else ""
        for key, weight in module.named_parameters(recurse=False):
            if f"{prefix}{key}" not in ignored:
                found[f"{prefix}{key}"] = gathered(weight.detach())
        if isinstance(module, QuantisedLinear):
            found[f"{prefix}weight"] = module.dequantised()
    for name, layer in adapted.items():
        with _whole(layer):
            found |= {f"{name}.{key}": weight for key, weight in _merged(layer).items()}
    return found


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """Within, weights that are spread over processes are whole ones in each; changes to them are lost."""
    before: list[tuple[nn.Module, dict[str, Any]]]
    before = [(part, dict(part._parameters)) for part in module.modules()]
    try:
        for part, weights in before:
            for name, weight in weights.items():
                if isinstance(weight, DTensor):
                    part._parameters[name] = nn.Parameter(
                        gathered(weight.detach()), requires_grad=weight.requires_grad
                    )
        yield
    finally:
        for part, weights in before:
            part._parameters.update(weights)


def _merged(layer: Any) -> dict[str, Tensor]:
    """The weights of a layer with its update, made on a copy of the base, which stays bit for bit."""
    base = layer.get_base_layer()
    quantised = isinstance(base, QuantisedLinear)
    layer.base_layer = _plain(base) if quantised else copy.deepcopy(base)
    # What lies on quantised weights refuses to be merged into them; this copy is not quantised.
    kind = LoraLinear if quantised else type(layer)
    try:
        with torch.no_grad():
            kind.merge(layer)
            merged = {key: weight.detach().clone() for key, weight in layer.base_layer.named_parameters()}
            kind.unmerge(layer)
    finally:
        layer.base_layer = base
    return merged


def _plain(base: QuantisedLinear) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    made.weight = nn.Parameter(base.dequantised(), requires_grad=False)
    if base.bias is not None:
        made.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
    return made


def plain_copy(
    model: nn.Module,
    *,
    dtype: torch.dtype,
    generation_config: Any = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Another model with the same weights in ``dtype``, without adapter and value head, to generate with.

    Where the model is spread over processes each gets a whole copy; all must ask. ``device``: that of the
    weights, unless given. Raises UnsupportedModelError for a class that transformers does not make from its
    configuration.
    """
    inner = unwrap(model)
    with torch.random.fork_rng(devices=[]):
        made: Any = AutoModelForCausalLM.from_config(copy.deepcopy(inner.config), dtype=dtype)
    if type(made) is not type(inner):
        raise UnsupportedModelError(
            f"{type(inner).__name__} cannot be copied: its configuration makes a {type(made).__name__}",
            fix="use a causal language model of transformers",
        )
    made.to(device or next(inner.parameters()).device)
    report = made.load_state_dict(plain_weights(model), strict=False)
    assert not report.unexpected_keys, report.unexpected_keys
    tied = getattr(made, "all_tied_weights_keys", None) or {}
    assert set(report.missing_keys) <= set(tied), report.missing_keys
    trained = dict(inner.named_buffers())
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            buffer.copy_(trained[name])
    if generation_config is not None:
        made.generation_config = generation_config
    return cast(PreTrainedModel, made.eval())


@contextmanager
def keeping_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the list holds the last hidden states [B, T, D] of the latest pass through the decoder."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept[:] = [output.last_hidden_state]

    hook = unwrap(model).base_model.register_forward_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()
