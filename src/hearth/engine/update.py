"""New values for the weights of a loaded model, packed or not, by the names that transformers gives them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hearth.engine.attention import graphs
from hearth.engine.linear import PackedLinear
from hearth.engine.runner import Runner
from hearth.errors import ModelError


def update(
    runner: Runner, weights: Mapping[str, torch.Tensor], max_model_len: int, max_num_seqs: int
) -> None:
    """`replace_weights` in the model of a runner, and what was made from the old ones anew."""
    packed_anew = replace_weights(runner.model, weights)
    if runner.stack is not None:
        runner.stack.read_weights()
    if packed_anew and runner.graphs is not None:  # it holds the addresses of the old ones
        runner.graphs = graphs.install(runner, max_model_len, max_num_seqs)


def replace_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> bool:
    """Copy ``weights`` into ``model``; weights that are not named stay. Whether anything was packed anew.

    They are converted to the type and device of the model. A tied weight has one name, that of the embedding.
    Raises `ModelError`, before anything changes, for an unknown name, another shape, or a bias of a packed
    layer without its weight.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    plain = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in plain.items()} | dict(
        _packed_shapes(packed)
    )
    _check(weights, shapes, packed)
    with torch.inference_mode():
        for name, parameter in plain.items():
            if name in weights:
                parameter.copy_(weights[name])
        repacked = [_repack(name, layer, weights) for name, layer in packed.items()]
    return any(repacked)


def _packed_shapes(packed: Mapping[str, PackedLinear]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, layer in packed.items():
        shape = (layer.out_features, layer.in_features)
        yield f"{name}.weight", shape[::-1] if layer.transposed else shape
        if layer.bias is not None:
            yield f"{name}.bias", (layer.out_features,)


def _check(
    weights: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    packed: Mapping[str, PackedLinear],
) -> None:
    for name, weight in weights.items():
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=1)
            raise ModelError(
                f"the model has no weight {name}",
                fix=f"did you mean {near[0]}?"
                if near
                else "give the names of the model's named_parameters()",
            )
        if tuple(weight.shape) != shapes[name]:
            raise ModelError(f"{name} has the shape {tuple(weight.shape)}, the model's is {shapes[name]}")
        layer = packed.get(name.removesuffix(".bias")) if name.endswith(".bias") else None
        if layer is not None and _weight_of(layer, weights) is None:
            raise ModelError(
                f"{name} is packed together with its weight, which is not given",
                fix=f"give {layer.name}.weight too",
            )


def _weight_of(layer: PackedLinear, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    own = weights.get(f"{layer.name}.weight")
    return own if own is not None or not layer.tied_to else weights.get(layer.tied_to)


def _repack(name: str, layer: PackedLinear, weights: Mapping[str, torch.Tensor]) -> bool:
    weight = _weight_of(layer, weights)
    if weight is None:
        return False
    bias, like = weights.get(f"{name}.bias"), layer.weight
    device = layer.device
    weight = weight.detach().to(device, like.dtype, copy=True)
    if bias is not None:
        bias = bias.detach().to(device, like.dtype, copy=True)
    layer.repack(weight.t() if layer.transposed else weight, layer.bias if bias is None else bias)
    return True
