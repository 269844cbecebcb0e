"""From a number of parameters to the shape of a decoder.

The count includes every weight once: embeddings too, and a tied output matrix only once. Pure arithmetic, so
that a planner can ask without building a model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from hearth.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

# model_type -> settings that make the shape what it is, beyond the common fields
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"rms_norm_eps": 1e-6},
    "qwen2": {"rms_norm_eps": 1e-6},
    "llama": {"rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False},
    "mistral": {"rms_norm_eps": 1e-5, "sliding_window": None},
}

# Above this the output matrix is separate, as in published families (Qwen3 ties up to 4B).
_LARGEST_TIED = 4_500_000_000
_MAX_LAYERS = 160
# From these sizes on, over how many processes tensor parallelism can split every layer: a node's eight GPUs.
_SPLITS = ((1_000_000_000, 8), (100_000_000, 2))
_TOLERANCE = 0.03


def parse_size(size: str | int) -> int:
    """``"260K"``, ``"10M"``, ``"1.5B"`` or a plain number, as a number of parameters."""
    text = str(size).strip().replace("_", "").upper()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text)
    value = int(float(match[1]) * _UNITS[match[2]] + 0.5) if match else 0
    if value < 1:
        raise ConfigError(
            f"model.size {size!r} is not a number of parameters",
            fix="write a number with K, M or B behind it, such as 260K, 10M or 1.5B",
        )
    return value


def format_count(value: float) -> str:
    """A count for people: ``5.1M``."""
    for unit in ("T", "B", "M", "K"):
        if value >= _UNITS[unit]:
            return f"{value / _UNITS[unit]:.3g}{unit}"
    return f"{value:.0f}"


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder with gated feed-forward and grouped queries."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    tied: bool

    def parameters(self, architecture: str, vocab_size: int) -> int:
        """All weights, a tied output matrix counted once."""
        embeddings = vocab_size * self.hidden_size * (1 if self.tied else 2)
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        layer = feed_forward + _attention_parameters(self, architecture) + 2 * self.hidden_size
        return embeddings + self.num_layers * layer + self.hidden_size


def _attention_parameters(shape: Shape, architecture: str) -> int:
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    weights = shape.hidden_size * (2 * queries + 2 * keys)
    if architecture == "qwen3":
        weights += 2 * shape.head_dim  # norms of queries and keys
    if architecture == "qwen2":
        weights += queries + 2 * keys  # biases
    return weights


def tensor_splits(num_parameters: int) -> int:
    """Over how many processes a model of this size can be split: both numbers of heads divide by it."""
    return next((splits for least, splits in _SPLITS if num_parameters >= least), 1)


def _heads(hidden_size: int, splits: int) -> tuple[int, int, int]:
    """Heads, key/value heads and head size for a width: queries share keys in pairs or fours.

    From two splits on, both numbers of heads divide by them if the width allows it.
    """
    head_dim = next(
        size for limit, size in ((2048, 128), (128, 64), (64, 32), (32, 16), (0, 8)) if hidden_size >= limit
    )
    num_heads = hidden_size // head_dim
    if num_heads % 8 == 0 and (num_heads >= 32 or splits == 8):
        return num_heads, 8, head_dim
    if splits > 1:
        group = next((size for size in (4, 2) if num_heads % (splits * size) == 0), 1)
        return num_heads, num_heads // group, head_dim
    group = next(size for size in (4, 2, 1) if num_heads % size == 0 and (num_heads >= 4 * size or size <= 2))
    return num_heads, num_heads // group, head_dim


def _widths(num_parameters: int, vocab_size: int, splits: int) -> list[int]:
    """Candidate hidden sizes; from 128 on they give an even number of heads, and one that splits as asked."""
    widths: list[int] = [8, 16, 24, 32, 48, 64, 96]
    widths += list(range(128, 2048, 128)) + list(range(2048, 4096, 512)) + list(range(4096, 32769, 1024))
    widths = [width for width in widths if width * vocab_size < num_parameters]
    return [width for width in widths if all(heads % splits == 0 for heads in _heads(width, splits)[:2])]


def shape_for_size(num_parameters: int, architecture: str, vocab_size: int) -> Shape:
    """The shape nearest to ``num_parameters`` that looks like published families.

    Width over depth grows slowly with size (about 40 at 1M, 64 at 50M, 110 at 10B), and the gated
    feed-forward is about three times as wide as the model; it takes up the rounding.
    """
    tied = num_parameters <= _LARGEST_TIED
    target_ratio = min(110.0, max(16.0, 64.0 * (num_parameters / 50e6) ** 0.12))
    best: tuple[float, Shape] | None = None
    splits = tensor_splits(num_parameters)
    for width in _widths(num_parameters, vocab_size, splits):
        num_heads, num_kv_heads, head_dim = _heads(width, splits)
        for depth in range(1, min(_MAX_LAYERS, 2 * width) + 1):
            bare = Shape(width, depth, num_heads, num_kv_heads, head_dim, 0, tied)
            rest = num_parameters - bare.parameters(architecture, vocab_size)
            multiple = 8 if width < 128 else 16 if width < 512 else 64 if width < 2048 else 256
            exact = rest / (3 * width * depth)
            inner = round(exact / multiple) * multiple
            if inner < 1.5 * width or inner > 6 * width:
                continue
            shape = Shape(width, depth, num_heads, num_kv_heads, head_dim, inner, tied)
            error = abs(shape.parameters(architecture, vocab_size) / num_parameters - 1)
            if error > _TOLERANCE:
                continue
            score = (
                abs(math.log(width / depth / target_ratio))
                + abs(math.log(inner / (3 * width)))
                + 10 * error
                + (0.5 if depth < 2 else 0.0)
            )
            if best is None or score < best[0]:
                best = (score, shape)
    if best is None:
        raise ConfigError(
            f"model.size {format_count(num_parameters)} cannot be built with a vocabulary of {vocab_size}: "
            f"the embeddings alone take {format_count(8 * vocab_size)} at the narrowest width",
            fix="ask for a larger model.size or a smaller tokenizer.vocab_size",
        )
    return best[1]


def config_for_size(
    size: str | int, architecture: str = "qwen3", vocab_size: int = 8192, context_length: int = 1024
) -> PreTrainedConfig:
    """A transformers configuration with about ``size`` parameters (within 3 %), embeddings included.

    Raises ``ConfigError`` for a size that is no number, an architecture whose shape Hearth does not know
    (any other can be given in full by ``model.config``), or a vocabulary too large for the size.
    """
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"model.architecture {architecture!r} has no shape for a size",
            fix=f"use one of {', '.join(_ARCHITECTURES)}, or give the whole configuration in model.config",
        )
    shape = shape_for_size(parse_size(size), architecture, vocab_size)
    return AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=context_length,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0 if context_length <= 8192 else 1e6},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **_ARCHITECTURES[architecture],
    )
