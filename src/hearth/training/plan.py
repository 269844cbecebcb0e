"""What a run is going to do, in numbers, before it does it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from hearth.training.loss import unwrap

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Buffers of libraries and of the loss, whatever the model.
_WORKSPACE = 64 << 20


@dataclass(frozen=True)
class TrainingPlan:
    """The resolved plan of a run. Memory is an estimate; everything else is exact."""

    objective: str
    architecture: str
    num_parameters: int
    num_trainable_parameters: int
    num_rows: int
    num_eval_rows: int
    sequence_length: int
    steps: int
    batch_size: int
    micro_batch_size: int
    tokens_per_step: int  # positions, padding included
    total_tokens: int
    epochs: float
    precision: str
    device: str
    flops_per_token: float
    memory_bytes: int  # of the fullest process
    dataset: str
    num_dropped: int = 0  # documents of the training split that are too long for a row
    num_truncated: int = 0  # and those that are cut off for it
    num_processes: int = 1

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


def too_long(rows: Any) -> tuple[int, int]:
    """How many documents are left out of these rows as they do not fit, and how many are cut off to fit."""
    counted = getattr(rows, "plan", None) or getattr(rows, "fitting", None)
    return getattr(counted, "num_dropped", 0), getattr(counted, "num_truncated", 0)


def resolve_steps(*, steps: int | None, epochs: float | None, rows: int, batch_size: int) -> int:
    """Optimizer steps of a run: as given, or so many passes over the rows, rounded up. Default: one pass."""
    if steps is not None:
        return steps
    return max(1, math.ceil((epochs or 1.0) * rows / batch_size))


def estimate_memory(
    model: nn.Module,
    *,
    micro_batch_size: int,
    sequence_length: int,
    precision: str,
    optimizer_bytes: int,
    checkpointing: str = "none",
    averaged: bool = False,
) -> int:
    """Bytes at the peak of a step: weights, gradients, optimizer state, activations, the output layer.

    The peak is the loss of any micro-batch but the first: all gradients are there, all activations too, and
    the output layer's gradient once more. ``optimizer_bytes``: of ``hearth.training.optimizers.state_bytes``.
    """
    weights = sum(weight.nbytes for weight in [*model.parameters(), *model.buffers()])
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = sum(weight.nbytes for weight in trainable)
    average = 4 * sum(weight.numel() for weight in trainable) if averaged else 0
    width = 4 if precision == "fp32" else 2
    # Autocast's copies, for one forward and backward pass; what is quantised is unpacked layer by layer.
    copies = sum(weight.nbytes for weight in model.parameters()) // 2 if width == 2 else 0
    tokens = micro_batch_size * sequence_length
    activations = activation_bytes(unwrap(model).config, width=width, checkpointing=checkpointing) * tokens
    attention_mask = micro_batch_size * sequence_length**2
    head = unwrap(model).get_output_embeddings() if hasattr(unwrap(model), "get_output_embeddings") else None
    weight = getattr(head, "weight", None)  # another stage of a pipeline may have it
    head_gradient = 0 if weight is None or not weight.requires_grad else 4 * weight.numel()
    step = copies + activations + attention_mask + head_gradient + _WORKSPACE
    return int(weights + gradients + optimizer_bytes + average + step)


def activation_bytes(config: PretrainedConfig, *, width: int, checkpointing: str) -> int:
    """Bytes a token that the layers keep for the backward pass; ``width``: bytes of the compute type.

    A Llama-shaped layer keeps about 14 vectors of the hidden size and 4 of the feed-forward size in the
    compute type, and 13 of the hidden size in float32 (norms, rotary embedding, residuals). Checkpointed in
    full it keeps its input; selectively its input and what products and attention give. Then one layer at a
    time has everything.
    """
    text = config.get_text_config()
    hidden, num_layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or hidden // heads
    queries, keys = heads * head_size, (getattr(text, "num_key_value_heads", None) or heads) * head_size
    exact = 13 if width < 4 else 2  # in float32 most of them are the same tensors
    whole = width * (14 * hidden + 4 * inner) + 4 * exact * hidden
    kept = {
        "none": whole,
        "selective": 4 * hidden + width * (2 * queries + 2 * keys + 2 * hidden + 2 * inner) + 4 * heads,
        "full": 4 * hidden,
    }[checkpointing]
    return int(num_layers * kept + (whole if checkpointing != "none" else 0))
