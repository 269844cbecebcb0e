"""Memory and values for a model that was spread over processes while it was on the meta device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hearth.errors import ModelError
from hearth.models.in_parts import Source
from hearth.parallel.shards import like, own_box


def fill(modules: Sequence[nn.Module], source: Source, *, device: torch.device) -> None:
    """Give what ``modules`` have on the meta device memory on ``device``, and the values of ``source``.

    ``modules``: the model and, in a pipeline, the stages that were made of it. Raises ModelError where a
    value is missing.
    """
    before = meta_tensors(modules)
    made: dict[int, Tensor] = {}
    for part in dict.fromkeys(part for module in modules for part in module.modules()):
        for holder in (part._parameters, part._buffers):
            for name, tensor in holder.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:
                        made[id(tensor)] = _with_memory(tensor, device)
                    holder[name] = made[id(tensor)]  # type: ignore[assignment]
    owners: dict[str, list[Tensor]] = {}
    for name, tensor in before:
        owners.setdefault(name, []).append(made[id(tensor)])
    missing = set(owners)
    with torch.no_grad():
        for name, found in source.tensors(owners.keys()):
            for own in {id(each): each for each in owners[name]}.values():
                _take(own, found)
            missing.discard(name)
    filled = {id(own) for name in owners.keys() - missing for own in owners[name]}
    absent = sorted(name for name in missing if any(id(own) not in filled for own in owners[name]))
    if absent:
        raise ModelError(f"there are no values for {absent[0]} and {len(absent) - 1} other weights")


def meta_tensors(modules: Sequence[nn.Module]) -> list[tuple[str, Tensor]]:
    """What has no memory, by the names that a source knows; tied ones under each of theirs."""
    return [
        (_plain(name), tensor)
        for module in modules
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        if tensor.is_meta
    ]


def _plain(name: str) -> str:
    """The name of a weight in the model that PEFT has put an adapter on."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _with_memory(tensor: Tensor, device: torch.device) -> Tensor:
    found: Tensor
    if isinstance(tensor, DTensor):
        found = DTensor.from_local(
            torch.empty_like(tensor.to_local(), device=device),
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    else:
        found = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(found, requires_grad=tensor.requires_grad)
    return found


def _take(own: Tensor, found: object) -> None:
    """Copy this process's part of a whole that may still be in a file."""
    box = own_box(own)
    if box is None:
        own.copy_(like(found[:].to(own.dtype), own))  # type: ignore[index]
        return
    local = own.to_local() if isinstance(own, DTensor) else own
    if local.numel():
        local.copy_(found[box] if box else found[...])  # type: ignore[index]
