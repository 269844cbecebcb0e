"""What the processes train: models of two sizes, rows of random tokens, and loops over them.

All layouts divide these sizes; the output layer is not the embedding, which no pipeline takes.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from spread.launch import free_port
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hearth.config import Recipe
from hearth.config.parallel import ParallelSection
from hearth.parallel.world import World, joined
from hearth.training import Trainer
from hearth.training.batches import Batch, collate, step_rows
from hearth.training.loss import token_loss_sum
from hearth.training.precision import autocast, choose_precision

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
    "5M": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4},
    "20M": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8},
    "30M": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8},
    "500M": {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 14},
}
VOCAB = 2048
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """A model and its step: ``batch`` rows of ``length`` tokens in micro-batches of ``micro``."""

    size: str
    length: int
    batch: int
    micro: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length


def new_model(size: str) -> Any:
    """A qwen3 of this size, the same in every process."""
    from transformers import AutoConfig

    from hearth.models.building import model_from_config

    hidden = SHAPES[size]["hidden_size"]
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCAB,
        **SHAPES[size],
        head_dim=64 if hidden % 64 == 0 and hidden > 64 else 16,
        num_attention_heads=hidden // 64 if hidden > 64 else 4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return model_from_config(config, seed=0)


def new_rows(length: int, num: int = 256) -> list[dict[str, Any]]:
    """Rows of random tokens, a document each."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (num, length + 1))
    return [
        {
            "input_ids": row[:-1],
            "labels": row[1:],
            "position_ids": np.arange(length),
            "segment_ids": np.zeros(length, dtype=np.int64),
        }
        for row in tokens
    ]


def recipe_of(shape: Shape, parallel: dict[str, Any], precision: str) -> Recipe:
    """The trainer's settings; the loops in plain torch take theirs from here."""
    return Recipe.model_validate(
        {
            "model": {"context_length": 2048},
            "data": {"sequence_length": shape.length, "packing": False},
            "parallel": parallel,
            "train": {
                "steps": 1000,
                "batch_size": shape.batch,
                "micro_batch_size": shape.micro,
                "learning_rate": 1e-3,
                "schedule": "constant",
                "precision": precision,
            },
        }
    )


@contextlib.contextmanager
def group(parallel: dict[str, Any], device: torch.device = CPU) -> Iterator[World]:
    """The processes, joined in this layout; afterwards they meet elsewhere."""
    with joined(ParallelSection.model_validate(parallel), device) as world:
        yield world
        # The next group must not meet in what is left of this one.
        os.environ["MASTER_PORT"] = str(world.from_main(free_port()))
    gc.collect()


@contextlib.contextmanager
def as_if_alone() -> Iterator[None]:
    """Within, nothing says that this process is one of several: its trainer would want the others."""
    size = os.environ.pop("WORLD_SIZE")
    try:
        yield
    finally:
        os.environ["WORLD_SIZE"] = size


class Plain:
    """A loop as one would write it by hand: the model under torch's DDP, a mean of cross-entropies, AdamW.

    ``loss``: ``torch`` is the model's logits and torch's cross-entropy; ``hearth`` our loss within the same
    loop, so that what is left of the difference is the trainer. ``spread``: instead of DDP.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        world: World,
        *,
        loss: str = "torch",
        spread: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.section, self.world, self.loss = recipe.train, world, loss
        self.precision = choose_precision(recipe.train.precision, world.device)
        self.model = model.train().to(world.device)
        if spread is None:
            spread = DistributedDataParallel if world.size > 1 else lambda module: module
        self.module: Any = spread(_Loss(self.model))
        # What spreads a model may make other weights of it.
        decayed = [weight for weight in self.model.parameters() if weight.ndim >= 2]
        others = [weight for weight in self.model.parameters() if weight.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": self.section.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=self.section.learning_rate,
            betas=(self.section.beta1, self.section.beta2),
            eps=self.section.epsilon,
            fused=True,
        )

    def step(self, rows: Sequence[Any], step: int) -> float:
        """One optimizer step on the rows that our trainer takes, too; the loss of all of them."""
        batch_size, micro = self.section.batch_size, int(self.section.micro_batch_size)
        indices = step_rows(step, batch_size=batch_size, seed=self.section.seed, num_rows=len(rows))
        own = self.world.share(indices)
        cut = [own[first : first + micro] for first in range(0, len(own), micro)]
        batches = [collate(rows, some).to(self.world.device) for some in cut]
        num_valid = len(indices) * len(rows[0]["labels"])
        total = torch.zeros((), device=self.world.device)
        for number, batch in enumerate(batches, 1):
            later = number < len(batches) and self.world.size > 1
            with self.module.no_sync() if later else contextlib.nullcontext():
                with autocast(self.precision, self.world.device):
                    summed = self.module(self.loss, batch)
                # DDP takes the mean over the processes.
                (summed * (self.world.size / num_valid)).backward()
            total += summed.detach() / num_valid
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.section.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(self.world.sum_over_batch(total))


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, loss: str, batch: Batch) -> Tensor:
        if loss == "hearth":
            return token_loss_sum(self.model, batch)[0]
        logits = self.model(
            input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
        ).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch.labels_BT.flatten(), reduction="sum")


def new_trainer(model: nn.Module, rows: Any, recipe: Recipe, world: World) -> Trainer:
    """Our trainer of a copy of the model."""
    return Trainer(model=copy.deepcopy(model), train_dataset=rows, config=recipe, world=world, progress=False)
