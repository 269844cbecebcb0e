"""First weights of a model, unit by unit, so that nobody needs all of them at once.

A unit is a decoder layer, or a module outside of the layers. Each is drawn from a seed of its own, after the
model was built: whoever draws a unit gets the same numbers, whichever others it draws. How a module is drawn
is the family's own affair (``_init_weights`` of transformers).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(frozen=True)
class Unit:
    """What is drawn at once of a model: with ``whole`` all under a module, otherwise its own tensors."""

    name: str
    module: nn.Module
    whole: bool
    draw: Callable[[nn.Module], None]  # of the innermost model of transformers around it

    def tensors(self) -> dict[str, Tensor]:
        """Weights and buffers of it, by their names in the model."""
        prefix = f"{self.name}." if self.name else ""
        weights = self.module.named_parameters(recurse=self.whole, remove_duplicate=False)
        buffers = self.module.named_buffers(recurse=self.whole, remove_duplicate=False)
        return {prefix + name: tensor for name, tensor in (*weights, *buffers)}


def units(model: PreTrainedModel) -> Iterator[Unit]:
    """The units of a model, those with tensors, in the order of its modules."""
    yield from _units_under(model, "", model._init_weights)


def _units_under(module: nn.Module, name: str, draw: Callable[[nn.Module], None]) -> Iterator[Unit]:
    if isinstance(module, PreTrainedModel):
        draw = module._init_weights
    unit = Unit(name, module, isinstance(module, GradientCheckpointingLayer), draw)
    if unit.tensors():
        yield unit
    if not unit.whole:
        for child_name, child in module.named_children():
            yield from _units_under(child, f"{name}.{child_name}" if name else child_name, draw)


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Draw all weights of a model anew, in place; the global random state stays."""
    done: set[int] = set()
    for unit in units(model):
        own = {id(tensor): tensor for tensor in unit.tensors().values()}
        if not own.keys() <= done:
            kept = {key: own[key].detach().clone() for key in own.keys() & done}
            _draw(unit.module, unit, seed)
            for key, value in kept.items():  # what is tied was drawn where it came first
                own[key].data.copy_(value)
        done |= own.keys()


def drawn_units(
    model: PreTrainedModel, seed: int, wanted: Container[str], *, weights: bool = True
) -> Iterator[dict[str, Tensor]]:
    """The first weights of a model on the meta device, a dictionary for each unit with a ``wanted`` name.

    Equal to those of `initialise`. Without ``weights`` only the buffers: what a file of weights has not.
    Raises ValueError where a family leaves a tensor as its constructor has made it, which is not known here.
    """
    done: set[int] = set()
    for unit in units(model):
        found = unit.tensors()
        kept = {name: tensor for name, tensor in found.items() if id(tensor) not in done}
        done |= {id(tensor) for tensor in found.values()}
        buffers = dict(unit.module.named_buffers(recurse=unit.whole))
        if not any(name in wanted for name in kept) or not (weights or buffers):
            continue
        made = copy.deepcopy(unit.module) if unit.whole else _alone(unit.module)
        _materialise(made, weights=weights)
        _draw(made, unit, seed)
        drawn = Unit(unit.name, made, unit.whole, unit.draw).tensors()
        for name in kept:
            tensor = drawn[name]
            if tensor.is_meta:
                continue
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise ValueError(f"{type(model).__name__} does not draw {name}")
        yield {name: drawn[name] for name in kept if name in wanted and not drawn[name].is_meta}


def _alone(module: nn.Module) -> nn.Module:
    """A copy of a module whose children are the ones of the original, which are on the meta device."""
    children = {id(child): child for child in module.children()}
    return copy.deepcopy(module, children)


def _materialise(module: nn.Module, *, weights: bool) -> None:
    """Give the tensors of a module that are on the meta device memory; what is not drawn later is NaN."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None or not tensor.is_meta or (isinstance(tensor, nn.Parameter) and not weights):
                continue
            if id(tensor) not in made:
                empty = torch.empty_like(tensor, device="cpu")
                empty = empty.fill_(torch.nan) if empty.is_floating_point() else empty.zero_()
                made[id(tensor)] = (
                    nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else empty
                )
            if isinstance(tensor, nn.Parameter):
                part._parameters[name] = made[id(tensor)]  # type: ignore[assignment]
            else:
                part._buffers[name] = made[id(tensor)]


def _draw(module: nn.Module, unit: Unit, seed: int) -> None:
    key = hashlib.sha256(f"{seed} {unit.name}".encode()).digest()
    guard: Any = initialization.guard_torch_init_functions()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), guard:
        torch.manual_seed(int.from_bytes(key[:7], "big"))
        _apply(module, unit.draw, whole=unit.whole)


def _apply(module: nn.Module, draw: Callable[[nn.Module], None], *, whole: bool) -> None:
    if isinstance(module, PreTrainedModel):
        draw = module._init_weights
    for child in module.children() if whole else ():
        _apply(child, draw, whole=True)
    draw(module)
