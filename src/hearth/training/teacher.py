"""The model that is learnt from: opened, compared with its student, frozen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hearth.errors import ConfigError
from hearth.models import load_model, load_tokenizer, resolve_reference
from hearth.training.batches import Batch
from hearth.training.divergence import Scorer
from hearth.training.identity import base_hash
from hearth.training.loss import split_head, unwrap

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer

# Weights of the teacher are only read, so they are kept in the type that products are computed in.
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and the hash by which a resumed run recognises it; part of a checkpoint."""

    model: nn.Module
    sha256: str = "in memory"

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()

    def scorer(self, batch: Batch, index_N: Tensor) -> Scorer:
        """What makes its logits at positions of the flattened batch."""
        with torch.no_grad():
            return scorer_of(self.model, batch, index_N)

    def state_values(self) -> Mapping[str, Any]:
        """Its hash."""
        return {"sha256": self.sha256}

    def load_state_values(self, values: Mapping[str, Any], /) -> None:
        """Raises ConfigError where the run began with another teacher."""
        if values["sha256"] != self.sha256:
            raise ConfigError(
                "train.distill.teacher is not the model that the run began with: its weights differ",
                fix="resume with that teacher, or start a new run",
            )


def scorer_of(model: nn.Module, batch: Batch, index_N: Tensor) -> Scorer:
    """Hidden states and output matrix of a model at positions of the flattened batch; logits where it
    does more than multiply the two, or where no process has the whole matrix."""
    inputs = {"input_ids": batch.input_ids_BT, "position_ids": batch.position_ids_BT, "use_cache": False}
    split = split_head(model)
    if split is None or isinstance(split[1].weight, DTensor):
        rows = model(**inputs).logits
        return Scorer(rows.reshape(-1, rows.shape[-1]).index_select(0, index_N), None)
    decoder, head = split
    hidden_BTD = decoder(**inputs).last_hidden_state
    return Scorer(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, index_N), head.weight)


def load_teacher(trainer: Trainer) -> Teacher:
    """The teacher of a recipe, on the trainer's device and in its precision.

    Raises NotFoundError or ModelError where there is none, ConfigError for one that numbers the tokens
    differently from the student or whose context is too short for the rows.
    """
    reference = str(trainer.config.train.distill.teacher)
    directory = resolve_reference(reference, trainer.workspace)
    model = load_model(directory, dtype=_DTYPES[trainer.precision])
    if trainer.tokenizer is None:
        _check_sizes(reference, model, trainer.model)
    else:
        _check_tokens(reference, load_tokenizer(directory), trainer.tokenizer)
    config: Any = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    length = trainer._sequence_length()
    if longest is not None and length > longest:
        raise ConfigError(
            f"data.sequence_length {length} exceeds the context of train.distill.teacher {reference!r}, "
            f"{longest}",
            fix=f"use at most {longest}",
        )
    moved: Any = model.to(trainer.device)
    return Teacher(moved, base_hash(directory))


def _check_sizes(reference: str, teacher: Any, student: nn.Module) -> None:
    theirs = teacher.config.get_text_config().vocab_size
    ours = unwrap(student).config.get_text_config().vocab_size
    if theirs != ours:
        raise ConfigError(
            f"train.distill.teacher {reference!r} has a vocabulary of {theirs} tokens, the student one of "
            f"{ours}",
            fix="distil from a model of the same family, or use mode: sequence",
        )


def _check_tokens(reference: str, teacher: Any, student: Any) -> None:
    """Logits are compared token by token: both must mean the same by a number, and cut texts alike."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    sizes = f"{len(theirs)} tokens, the student's {len(ours)}"
    if theirs != ours:
        example = min(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
        raise ConfigError(
            f"train.distill.teacher {reference!r} has another vocabulary than the student: the teacher's has "
            f"{sizes}, and {example!r} is number {theirs.get(example)} there and {ours.get(example)} here",
            fix="give the student the teacher's tokenizer (model.size and tokenizer.base), distil from a "
            "model of the same family, or use mode: sequence",
        )
    if _splitting(teacher) != _splitting(student):
        raise ConfigError(
            f"train.distill.teacher {reference!r} has the student's vocabulary (the teacher's has {sizes}) "
            "but cuts texts into tokens differently",
            fix="distil from a model of the same family, or use mode: sequence",
        )


def _splitting(tokenizer: Any) -> list[Any]:
    """How a tokenizer cuts a text; what it puts around one does not matter here."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    return [described.get(part) for part in ("normalizer", "pre_tokenizer", "model")]
