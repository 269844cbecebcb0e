"""Tensors that several processes have written in parts, read as wholes or as what one process needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hearth.errors import IntegrityError

PLACES = "places"  # key of a file's metadata: {tensor: [shape of the whole, offset]}
_FILE = re.compile(r"(?P<group>[a-z][a-z0-9_]*)-(?P<rank>\d{5})-of-(?P<size>\d{5})")

Place = tuple[tuple[int, ...], tuple[int, ...]]


def file_stem(group: str, rank: int, size: int) -> str:
    """Name of the file of a process, without its ending; one process alone writes ``GROUP``."""
    return group if size == 1 else f"{group}-{rank:05}-of-{size:05}"


def group_of(stem: str) -> str:
    """The group that a file belongs to."""
    found = _FILE.fullmatch(stem)
    return stem if found is None else found["group"]


def encode_places(places: Mapping[str, Place]) -> str:
    """For the metadata of a file."""
    return json.dumps({name: [list(shape), list(offset)] for name, (shape, offset) in places.items()})


@dataclass(frozen=True)
class _Box:
    path: Path
    offset: tuple[int, ...]
    size: tuple[int, ...]


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of a group, by name; each is put together when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._boxes: dict[str, list[_Box]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                places: dict[str, Any] = json.loads((file.metadata() or {}).get(PLACES, "{}"))
                for name in file.keys():  # noqa: SIM118 - no mapping
                    size = tuple(file.get_slice(name).get_shape())
                    shape, offset = places.get(name, (size, (0,) * len(size)))
                    self._shapes[name] = tuple(shape)
                    self._boxes.setdefault(name, []).append(_Box(path, tuple(offset), size))

    def __getitem__(self, name: str) -> Tensor:
        boxes, shape = self._boxes[name], self._shapes[name]
        whole: Tensor | None = None
        num = 0
        for box in boxes:
            with safe_open(box.path, framework="pt") as file:
                part: Tensor = file.get_tensor(name)
            if box.size == shape:
                return part
            whole = torch.empty(shape, dtype=part.dtype) if whole is None else whole
            whole[tuple(slice(at, at + n) for at, n in zip(box.offset, box.size, strict=True))] = part
            num += part.numel()
        if whole is None or num != whole.numel():
            raise IntegrityError(f"{boxes[0].path.parent} has only {num} elements of {name} {list(shape)}")
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._boxes)

    def __len__(self) -> int:
        return len(self._boxes)
