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
        self._files: dict[Path, Any] = {}  # open, as long as somebody may ask
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            file: Any = safe_open(path, framework="pt")
            self._files[path] = file
            places: dict[str, Any] = json.loads((file.metadata() or {}).get(PLACES, "{}"))
            for name in file.keys():  # noqa: SIM118 - no mapping
                size = tuple(file.get_slice(name).get_shape())
                shape, offset = places.get(name, (size, (0,) * len(size)))
                self.shapes[name] = tuple(shape)
                self._boxes.setdefault(name, []).append(_Box(path, tuple(offset), size))

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, tuple(slice(0, size) for size in self.shapes[name]))

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, in its own memory. Raises IntegrityError where files have only some of it."""
        if any(want.start >= want.stop for want in box):  # a process may have none of a small one
            first = self._files[self._boxes[name][0].path]
            return torch.empty([want.stop - want.start for want in box], dtype=first.get_tensor(name).dtype)
        found: Tensor | None = None
        num = 0
        for part in self._boxes[name]:
            shared = [
                (max(want.start, at), min(want.stop, at + size))
                for want, at, size in zip(box, part.offset, part.size, strict=True)
            ]
            if any(first >= last for first, last in shared):
                continue
            there = tuple(slice(a - at, b - at) for (a, b), at in zip(shared, part.offset, strict=True))
            values: Tensor = self._files[part.path].get_slice(name)[there or ...]
            if all(span == (want.start, want.stop) for span, want in zip(shared, box, strict=True)):
                # A view of the file would keep it, and may not be contiguous, as fused optimizers need it.
                return values.clone(memory_format=torch.contiguous_format)
            if found is None:
                found = torch.empty([want.stop - want.start for want in box], dtype=values.dtype)
            found[tuple(slice(a - w.start, b - w.start) for (a, b), w in zip(shared, box, strict=True))] = (
                values
            )
            num += values.numel()
        if found is None or num != found.numel():
            folder = self._boxes[name][0].path.parent
            raise IntegrityError(f"{folder} has only {num} elements of {name} {list(self.shapes[name])}")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._boxes)

    def __len__(self) -> int:
        return len(self._boxes)
