"""A model without memory for its weights, and where each of them comes from when somebody wants it.

For models that are larger than what one process can hold: build it here, spread it over processes, and let
each take what it has a part of.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from hearth.config.recipe import ModelSection
from hearth.errors import UnsupportedModelError
from hearth.models.building import config_for_section, require_embeddings, with_special_tokens
from hearth.models.initialising import drawn_units, units
from hearth.models.loading import (
    check_model_directory,
    load_config,
    quiet_transformers,
    read_safetensors_header,
    weight_files,
)
from hearth.models.pieces import Joined, OnDisk, Piece, pieces_of
from hearth.models.reference import resolve_reference
from hearth.models.saving import saved_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hearth.workspace import Workspace

_TWIN_VOCABULARY = 16
_SEED_OF_TWIN = 0


class Sliceable(Protocol):
    """A tensor, or what reads a part of one from a file."""

    def __getitem__(self, box: Any, /) -> Any: ...


class Source(Protocol):
    """Where the weights of a model come from."""

    def tensors(self, wanted: Container[str]) -> Iterator[tuple[str, Sliceable]]:
        """The weights and buffers with these names."""


@dataclass(frozen=True)
class NewWeights:
    """Random ones, by a seed, for a model on the meta device."""

    model: PreTrainedModel
    seed: int

    def tensors(self, wanted: Container[str]) -> Iterator[tuple[str, Sliceable]]:
        """Those of `initialise`."""
        for found in drawn_units(self.model, self.seed, wanted):
            yield from found.items()


@dataclass(frozen=True)
class SavedWeights:
    """Those of safetensors files; buffers that are in no file by the family."""

    model: PreTrainedModel
    pieces: Mapping[str, Piece | Joined]
    file_of: Mapping[str, Path]  # by the names of tensors in files

    def tensors(self, wanted: Container[str]) -> Iterator[tuple[str, Sliceable]]:
        """A part is read when it is asked for."""
        together: dict[tuple[Path, ...], list[str]] = {}
        for name in filter(wanted.__contains__, self.pieces):
            paths = {self.file_of[each] for each in self.pieces[name].names()}
            together.setdefault(tuple(sorted(paths)), []).append(name)
        for where, names in together.items():
            files: dict[str, Any] = {}
            for path in where:
                file: Any = safe_open(path, framework="pt")
                files |= dict.fromkeys(file.keys(), file)
            for name in names:
                yield name, OnDisk(self.pieces[name], files)
        for found in drawn_units(self.model, 0, wanted, weights=False):
            yield from ((name, tensor) for name, tensor in found.items() if name not in self.pieces)


@dataclass(frozen=True)
class InParts:
    """``model`` is on the meta device; ``twin``, a small one of its kind, has weights to try things with."""

    model: PreTrainedModel
    source: Source
    twin: PreTrainedModel


def build_in_parts(
    section: ModelSection,
    *,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    workspace: Workspace | None = None,
) -> InParts | None:
    """What `build_model` builds, without its weights; None where the family can only be built as a whole.

    That is so where the model is put together from its files in a way that `pieces_of` does not know, or a
    family leaves weights as its constructor made them. Raises as `build_model` does.
    """
    files: list[Path] = []
    if section.base is not None:
        directory = check_model_directory(resolve_reference(section.base, workspace))
        config, files = load_config(directory), weight_files(directory)
    else:
        config = with_special_tokens(config_for_section(section, vocab_size=vocab_size), tokenizer)
    try:
        model, whole, twin = _on_meta(config), _on_meta(config), _twin(config)
        _require_drawable(whole)
    except Exception:  # noqa: BLE001 - whatever a family does with what it does not expect
        return None
    if section.base is None:
        return InParts(model, NewWeights(whole, seed), twin)
    source = _saved(config, whole, files)
    if source is None:
        return None
    require_embeddings(model, vocab_size, section.base)
    return InParts(model.eval(), source, twin)


def _on_meta(config: Any) -> PreTrainedModel:
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return cast(PreTrainedModel, model)


def _twin(config: Any) -> PreTrainedModel:
    """One layer and few tokens of a family, with all that its configuration says otherwise."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size = 1, _TWIN_VOCABULARY
    text.bos_token_id = text.eos_token_id = text.pad_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(_SEED_OF_TWIN)
        twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return cast(PreTrainedModel, twin)


def _require_drawable(model: PreTrainedModel) -> None:
    """Raise ValueError for a family that leaves tensors as its constructor made them; tries one of a kind."""
    kinds: dict[tuple[str, ...], set[str]] = {}
    for unit in units(model):
        if not isinstance(unit.module, torch.nn.Embedding | torch.nn.Linear):
            kind = (
                tuple(type(part).__name__ for part in unit.module.modules()) if unit.whole else (unit.name,)
            )
            kinds.setdefault(kind, set(unit.tensors()))
    for names in kinds.values():
        for _ in drawn_units(model, 0, names):
            pass


def _saved(config: Any, model: PreTrainedModel, files: list[Path]) -> SavedWeights | None:
    """Where the weights are, if the files have all of them in their shapes, in ways that are known."""
    if getattr(config, "quantization_config", None) is not None:
        return None
    headers: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    for path in files:
        header = read_safetensors_header(path)
        headers |= header
        paths |= dict.fromkeys(header, path)
    try:
        pieces = pieces_of(model, headers)
    except UnsupportedModelError:
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in saved_tensors(model)}
    if {name: piece.shape for name, piece in pieces.items()} != shapes:
        return None  # too many, as well: tied ones that the files have twice may differ
    return SavedWeights(model, pieces, paths)
