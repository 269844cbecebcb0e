"""Where in the files of a model each of its weights is: under other names, too, and in pieces.

Files of mixtures of experts hold a matrix for each expert; the model has one tensor for all. transformers
puts them together when it loads a whole model, by rules of each family (``core_model_loading``). The same
rules tell here what a weight is made of, so that a part of it can be read, or one weight written, without the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from hearth.errors import UnsupportedModelError
from hearth.models.loading import SAFETENSORS_DTYPES

Box = tuple[slice, ...]
Read = Callable[[str, Box], Tensor]  # a part of a tensor of the files
# From the matrices of experts to one tensor for all, with the two projections of a gated unit as one.
_RULES = ([MergeModulelist], [Concatenate], [MergeModulelist, Concatenate])


@dataclass(frozen=True)
class Piece:
    """A tensor of the files."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def names(self) -> Iterator[str]:
        """The tensors of the files that it is made of."""
        yield self.name

    def read(self, box: Box, read: Read, out: Tensor) -> None:
        """Put a part of it into ``out``; ``box`` has a slice of step 1 with both ends for each dimension."""
        out.copy_(read(self.name, box))


@dataclass(frozen=True)
class Joined:
    """Pieces one after the other along ``dim``: stacked there, with ``new``, or one longer than each."""

    pieces: tuple[Piece | Joined, ...]
    dim: int
    new: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = list(self.pieces[0].shape)
        if self.new:
            shape.insert(self.dim, len(self.pieces))
        else:
            shape[self.dim] = sum(piece.shape[self.dim] for piece in self.pieces)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of every piece."""
        return self.pieces[0].dtype

    def names(self) -> Iterator[str]:
        """The tensors of the files that it is made of."""
        for piece in self.pieces:
            yield from piece.names()

    def read(self, box: Box, read: Read, out: Tensor) -> None:
        """Put a part of it into ``out``, as of a `Piece`; pieces outside are not read."""
        before, wanted, after = box[: self.dim], box[self.dim], box[self.dim + 1 :]
        if self.new:
            for at, piece in enumerate(self.pieces[wanted]):
                piece.read((*before, *after), read, out.select(self.dim, at))
            return
        first = 0
        for piece in self.pieces:
            size = piece.shape[self.dim]
            start, stop = max(wanted.start - first, 0), min(wanted.stop - first, size)
            if start < stop:
                there = out.narrow(self.dim, first + start - wanted.start, stop - start)
                piece.read((*before, slice(start, stop), *after), read, there)
            first += size


@dataclass(frozen=True)
class OnDisk:
    """A weight that is read part by part, when asked for; ``files``: open ones, by their tensors' names."""

    piece: Piece | Joined
    files: Mapping[str, Any]

    def __getitem__(self, box: Sequence[slice] | slice | EllipsisType) -> Tensor:
        slices = () if isinstance(box, EllipsisType) else (box,) if isinstance(box, slice) else tuple(box)
        slices += (slice(None),) * (len(self.piece.shape) - len(slices))
        ends = (one.indices(size)[:2] for one, size in zip(slices, self.piece.shape, strict=True))
        whole = tuple(slice(start, max(start, stop)) for start, stop in ends)
        if isinstance(self.piece, Piece):
            return self._read(self.piece.name, whole)
        out = torch.empty([one.stop - one.start for one in whole], dtype=self.piece.dtype)
        self.piece.read(whole, self._read, out)
        return out

    def _read(self, name: str, box: Box) -> Tensor:
        found: Tensor = self.files[name].get_slice(name)[box or ...]
        return found


def pieces_of(
    model: PreTrainedModel, headers: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Piece | Joined]:
    """What each weight of a model is made of, by its name there.

    ``headers``: what safetensors say of each tensor. As when transformers loads them, what the model has no
    place for is left out. Raises UnsupportedModelError where a rule of the family is not one of those known
    here, a tensor is of another kind than the weight, or tensors do not fit together.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    there, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, dict[str | None, list[Piece | Joined]]] = {}
    for name in sorted(headers, key=dot_natural_key):  # experts by their numbers
        target, pattern = rename_source_key(name, renamings, converters, prefix, there)
        if target not in there and name in there:
            target, pattern = rename_source_key(name, [], [], prefix, there)
        if target in there:
            dtype = _dtype_of(name, headers[name]["dtype"], there[target])
            piece = Piece(name, tuple(headers[name]["shape"]), dtype)
            found.setdefault(target, {}).setdefault(pattern, []).append(piece)
    return {target: _put_together(target, lists, of_pattern) for target, lists in found.items()}


def _put_together(
    name: str, lists: Mapping[str | None, list[Piece | Joined]], of_pattern: Mapping[str, Any]
) -> Piece | Joined:
    rule = next((of_pattern[pattern] for pattern in lists if pattern is not None), None)
    if rule is None or not _is_known(rule):
        (pieces, *others) = lists.values()
        if rule is not None or others or len(pieces) > 1:
            raise UnsupportedModelError(f"{name} is put together by a rule that is not known here")
        return pieces[0]
    ordered = [lists[pattern] for pattern in rule.source_patterns if pattern in lists]
    for operation in rule.operations:
        if type(operation) is MergeModulelist:
            ordered = [[_joined(name, pieces, operation.dim, new=True)] for pieces in ordered]
        else:
            together = [piece for pieces in ordered for piece in pieces]
            ordered = [[_joined(name, together, operation.dim, new=False)]]
    if len(ordered) > 1 or None in lists:
        raise UnsupportedModelError(f"{name} is in the files in more than one way")
    return ordered[0][0]


def _dtype_of(name: str, told: str, weight: Tensor) -> torch.dtype:
    dtype = SAFETENSORS_DTYPES.get(told)
    if dtype is None or dtype.is_floating_point != weight.is_floating_point():
        raise UnsupportedModelError(f"{name} is of type {told}, its weight of {weight.dtype}")
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise UnsupportedModelError(f"{name} is of type {told}: a quantised weight, which needs its scale")
    return dtype


def _joined(name: str, pieces: Sequence[Piece | Joined], dim: int, *, new: bool) -> Joined:
    num_dims = len(pieces[0].shape) + new
    dim %= num_dims
    rests = {piece.shape if new else (*piece.shape[:dim], *piece.shape[dim + 1 :]) for piece in pieces}
    kinds = {(len(piece.shape), piece.dtype) for piece in pieces}
    if len(rests) > 1 or len(kinds) > 1:
        raise UnsupportedModelError(f"the pieces of {name} do not fit together")
    return Joined(tuple(pieces), dim, new)


def _is_known(rule: Any) -> bool:
    """Whether a rule makes one weight of the model, by nothing but joining."""
    return (
        type(rule) is WeightConverter
        and len(rule.target_patterns) == 1
        and [type(one) for one in rule.operations] in _RULES
    )


def are_written_one_by_one(model: PreTrainedModel) -> bool:
    """Whether `as_in_files` is right for each weight of a model by itself."""
    rules = get_model_conversion_mapping(model, add_legacy=False)
    return all(type(rule) in (WeightRenaming, PrefixChange) or _is_known(rule) for rule in rules)


def as_in_files(model: PreTrainedModel, name: str, weight: Tensor) -> dict[str, Tensor]:
    """What files hold of one weight of a model, by their names."""
    found: dict[str, Tensor] = revert_weight_conversion(model, {name: weight})
    return found
