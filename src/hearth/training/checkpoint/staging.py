"""Copies of the state on the host, so that training goes on while they are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Groups = dict[str, dict[str, Tensor]]


class Stager:
    """Host buffers that are allocated once and used for every checkpoint: one copy of the whole state.

    Buffers of tensors on a GPU are pinned, so that all copies run at the speed of the bus and together.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def stage(self, groups: Mapping[str, Mapping[str, Tensor]]) -> Groups:
        """Copies of all tensors, complete when this returns; they stay valid until the next call."""
        staged: Groups = {}
        devices: set[torch.device] = set()
        kept: dict[tuple[str, str], Tensor] = {}
        for group, tensors in groups.items():
            staged[group] = {}
            for name, tensor in tensors.items():
                buffer = self._buffer(group, name, tensor)
                buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
                kept[group, name] = staged[group][name] = buffer
                if tensor.is_cuda:
                    devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = kept
        return staged

    def _buffer(self, group: str, name: str, tensor: Tensor) -> Tensor:
        found = self._buffers.get((group, name))
        if found is not None and found.shape == tensor.shape and found.dtype == tensor.dtype:
            return found
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
