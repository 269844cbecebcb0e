"""What the demo trains, as pure functions of the machine and the minutes it may take.

The corpus is the source of the Python standard library, which every machine with Python has. The model
learns to continue it, then to answer questions made from its signatures and docstrings.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from hearth.config import Recipe

MODEL_NAME = "stdlib-assistant"
BASE_NAME = "stdlib-base"
DEFAULT_MINUTES = 3.5
# Where the training minutes go: reading the library, then learning to answer.
PRETRAIN_SHARE = 0.7
# More passes than this over so small a corpus is memorising it.
MAX_PRETRAIN_EPOCHS = 8.0
MAX_CHAT_EPOCHS = 6.0


@dataclass(frozen=True)
class Scale:
    """One size of the demo. Rows are sequences of ``sequence_length`` tokens."""

    size: str
    vocab_size: int
    context_length: int
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    chat_learning_rate: float


# Small batches: in so few minutes the number of updates counts for more than the noise in each. 2.3 M tokens
# left a held-out loss of 4.41 nats in batches of 32 rows, 4.21 in 16 and 4.05 in 8.
CPU_SCALE = Scale("3M", 4096, 1024, 256, 8, 8, 2.5e-3, 1e-3)
GPU_SCALE = Scale("60M", 8192, 1024, 512, 128, 32, 1e-3, 3e-4)


def choose_scale(device: str) -> Scale:
    """The size of the demo on ``device`` (``cpu`` or ``cuda``)."""
    return GPU_SCALE if device == "cuda" else CPU_SCALE


def steps_within(
    seconds: float, seconds_per_step: float, *, rows: int, batch_size: int, epochs: float
) -> int:
    """Optimizer steps that fit into ``seconds``, at least 2, at most ``epochs`` passes over ``rows`` rows."""
    assert seconds_per_step > 0
    most = max(2, int(epochs * rows / batch_size))
    return max(2, min(int(seconds / seconds_per_step), most))


def pretrain_recipe(scale: Scale, *, steps: int, seed: int = 0) -> Recipe:
    """From random weights: continue the library's source and documentation."""
    return Recipe.model_validate(
        {
            "model": {"size": scale.size, "context_length": scale.context_length},
            "tokenizer": {"vocab_size": scale.vocab_size},
            "data": {
                "sources": [{"path": "stdlib", "format": "stdlib", "license": "PSF-2.0"}],
                "filters": {"min_chars": 64, "max_line_chars": 2000, "max_duplicate_lines": 0.7},
                "validation_fraction": 0.05,
                "sequence_length": scale.sequence_length,
                "seed": seed,
            },
            "train": {
                "objective": "pretrain",
                "steps": steps,
                "batch_size": scale.batch_size,
                "micro_batch_size": scale.micro_batch_size,
                "learning_rate": scale.learning_rate,
                "schedule": "wsd",
                "warmup_steps": min(steps // 10, 50),
                "decay_fraction": 0.3,
                "evaluate_every": max(1, steps // 4),
                "evaluate_rows": 64,
                "seed": seed,
            },
            "checkpoint": {"every": max(1, steps // 3)},
            "track": {"name": "demo-pretrain"},
        }
    )


def chat_recipe(scale: Scale, *, steps: int, base: str = "", tokenizer: str = "", seed: int = 0) -> Recipe:
    """From the pretrained model: answer questions about the library."""
    return Recipe.model_validate(
        {
            "model": {"base": base or None, "context_length": scale.context_length},
            "tokenizer": {"base": tokenizer or None, "vocab_size": scale.vocab_size},
            "data": {
                "sources": [{"path": "stdlib", "format": "stdlib-chat", "license": "PSF-2.0"}],
                "validation_fraction": 0.05,
                "sequence_length": scale.sequence_length,
                "seed": seed,
            },
            "train": {
                "objective": "sft",
                "steps": steps,
                "batch_size": scale.batch_size,
                "micro_batch_size": scale.micro_batch_size,
                "learning_rate": scale.chat_learning_rate,
                "schedule": "cosine",
                "warmup_steps": min(steps // 10, 20),
                "weight_decay": 0.01,
                "evaluate_every": max(1, steps // 2),
                "evaluate_rows": 64,
                "seed": seed,
            },
            "checkpoint": {"every": max(1, steps // 2)},
            "track": {"name": "demo-chat"},
        }
    )


def reuse_key(stage: str, *, minutes: float, scale: Scale, dataset: str, base: str = "") -> str:
    """Names the work of a training stage: equal keys mean that nothing which decides the result changed.

    The number of steps is left out on purpose: it follows from how fast the machine was just then.
    """
    # A recipe with one step stands for all others of the stage: it carries every setting but the steps.
    recipe = pretrain_recipe(scale, steps=2) if stage == "pretrain" else chat_recipe(scale, steps=2)
    facts: dict[str, Any] = {
        "stage": stage,
        "minutes": minutes,
        "scale": asdict(scale),
        "dataset": dataset,
        "base": base,
        "recipe": recipe.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
