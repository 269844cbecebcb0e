"""From a model reference to a model, a tokenizer and the facts that the engine needs of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hearth.engine.config import EngineConfig
from hearth.engine.timeline import Timeline
from hearth.engine.tp.collectives import Collectives
from hearth.engine.tp.leader import Leader
from hearth.errors import ConfigError, EngineError
from hearth.models import load_model, load_tokenizer, resolve_reference


@dataclass
class LoadedModel:
    """A model on its device, and its tokenizer; ``tokenizer`` is None where only token ids are used."""

    model: PreTrainedModel
    tokenizer: Any
    path: Path | None = None
    leader: Leader | None = None  # with tensor parallelism: the other ranks,
    group: Collectives | None = None  # and what joins them; the model is rank 0's part


def load(reference: str | Path, config: EngineConfig, timeline: Timeline | None = None) -> LoadedModel:
    """Open ``reference`` (registry name, directory, hf:org/name) as `EngineConfig` asks for it."""
    timeline = timeline or Timeline()
    path = resolve_reference(reference)
    device = choose_device(config.device)
    with timeline.stage("tokenizer"):
        tokenizer = load_tokenizer(path)
    try:
        if config.tensor_parallel > 1:
            from hearth.engine.tp.start import start_ranks

            model, leader, group = start_ranks(path, config, device)
            return LoadedModel(model, tokenizer, path, leader, group)
        with timeline.stage("weights"):
            model = load_model(path, dtype=config.dtype, device="cpu")
            if config.dtype == "auto" and model.dtype is torch.float16 and device.type == "cpu":
                model = model.float()
            return LoadedModel(model.to(device), tokenizer, path)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise EngineError(
            f"not enough memory to load {path}: {error}", fix="use a smaller model or a smaller dtype"
        ) from error


def choose_device(name: str) -> torch.device:
    """The device of this name; raises `ConfigError` if there is no such device here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}", fix="use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {name!r}, and torch sees {torch.cuda.device_count()} GPUs",
            fix="use auto or cpu; `hearth doctor` says why a GPU is not seen",
        )
    return device


def eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a sequence: of the generation config, else of the config, else of the tokenizer."""
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config.get_text_config(decoder=True), tokenizer):
        value = getattr(source, "eos_token_id", None)
        if isinstance(value, int):
            return (value,)
        if value:
            return tuple(int(token_id) for token_id in value)
    return ()
