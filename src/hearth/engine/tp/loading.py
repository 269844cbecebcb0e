"""Builds the model of one rank, reading from the files only what it holds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hearth.engine.config import EngineConfig
from hearth.engine.tp.collectives import Collectives
from hearth.engine.tp.layers import GatheredColumns, RowParallel
from hearth.engine.tp.sharding import Cut, find_cuts, linear_of, own_part
from hearth.errors import ModelError
from hearth.models import load_model, resolve_dtype
from hearth.models.loading import load_config, read_safetensors_header, weight_files

# (name of a tensor, dimension to cut or None) -> what this rank holds of it
Read = Callable[[str, int | None], torch.Tensor]


def load_part(
    path: Path, config: EngineConfig, rank: int, device: torch.device
) -> tuple[PreTrainedModel, Callable[[Collectives], None]]:
    """The model of ``rank``, and a function that connects its layers with those of the other ranks.

    Raises what `hearth.models.load_model` raises, and what `find_cuts` raises.
    """
    num_ranks = config.tensor_parallel
    model_config = load_config(path)
    dtype = resolve_dtype(config.dtype) or model_config.dtype or torch.float32
    if config.dtype == "auto" and dtype is torch.float16 and device.type == "cpu":
        dtype = torch.float32
    # Memory for whole weights is asked for, but not touched: the divided ones are replaced below.
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    model.eval().requires_grad_(False)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    cuts = find_cuts(model, num_ranks)
    with ExitStack() as stack:
        read = _reader(path, model, stack, rank, num_ranks, dtype)
        parts = {cut.name: _read_linear(model.get_submodule(cut.name), cut, read) for cut in cuts}
        _fill_whole(model, set(parts), read)
    for cut in cuts:
        _replace(model, cut.name, parts[cut.name][0])
    model.to(device)

    def connect(group: Collectives) -> None:
        for cut in cuts:
            linear, bias = parts[cut.name]
            if cut.gathers:
                _replace(model, cut.name, GatheredColumns(linear, group))
            elif cut.adds:
                bias = None if bias is None else bias.to(device)
                _replace(model, cut.name, RowParallel(linear, bias, group, splits_input=cut.splits_input))

    return model, connect


def _reader(
    path: Path, model: PreTrainedModel, stack: ExitStack, rank: int, num_ranks: int, dtype: torch.dtype
) -> Read:
    """How to get tensors: slices of the files, if they have the model's names, else of a whole model."""
    where: dict[str, Any] = {}
    for file in weight_files(path):
        read_safetensors_header(file)  # says what is wrong with a damaged one
        handle = stack.enter_context(safe_open(file, framework="pt"))
        where.update(dict.fromkeys(handle.keys(), handle))
    needed = {name for name, _ in model.named_parameters()}
    whole: dict[str, torch.Tensor] = {}
    if not needed <= set(where):
        # Other names, or other formats: transformers knows how to convert them.
        whole = load_model(path, dtype=dtype).state_dict()

    def read(name: str, dim: int | None) -> torch.Tensor:
        source: Any = whole[name] if whole else where[name].get_slice(name)
        shape = list(source.shape if whole else source.get_shape())
        expected = list(_tensor_of(model, name).shape)
        if shape != expected:
            raise ModelError(f"{path}: {name} has shape {shape}, the configuration means {expected}")
        index = [slice(None)] * len(shape)
        if dim is not None:
            index[dim] = own_part(shape[dim], rank, num_ranks)
        part: torch.Tensor = source[tuple(index)]
        return part.to(dtype, copy=True).contiguous()

    return read


def _read_linear(module: nn.Module, cut: Cut, read: Read) -> tuple[nn.Linear, torch.Tensor | None]:
    """The part of a linear layer, and the bias that is added after the ranks' parts were added."""
    weight = read(f"{cut.name}.weight", cut.dim)
    if getattr(module, "bias", None) is None:
        return linear_of(weight, None), None
    if cut.adds:
        return linear_of(weight, None), read(f"{cut.name}.bias", None)
    return linear_of(weight, read(f"{cut.name}.bias", 0)), None


def _fill_whole(model: PreTrainedModel, divided: set[str], read: Read) -> None:
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in divided:
            parameter.data.copy_(read(name, None))


def _tensor_of(model: PreTrainedModel, name: str) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(module), leaf)
    return tensor


def _replace(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
