"""What a planner must know of a model: counts and widths, from a configuration, without any weights."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hearth.errors import ConfigError, UnsupportedModelError
from hearth.parallel.checks import NUM_EXPERTS

if TYPE_CHECKING:
    from hearth.config.recipe import Recipe
    from hearth.workspace import Workspace

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Weight:
    """One weight: where it is, its shape, and whether it is a matrix between hidden layers."""

    part: str  # embedding, head, attention, dense, experts, norm
    layer: int | None
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def hidden(self) -> bool:
        """What Muon orthogonalises: a matrix, or a stack of them, inside of a layer."""
        return self.layer is not None and len(self.shape) >= 2


@dataclass(frozen=True)
class Layer:
    """Widths of one decoder layer. A layer of a mixture may have shared experts: ``inner`` counts those."""

    inner: int  # width of the feed-forward that every token takes
    expert_inner: int  # width of one routed expert; 0 without
    window: int | None  # sliding window, in tokens


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """A causal language model in numbers."""

    model_type: str
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    tied: bool
    gated: bool
    qk_norm: bool
    num_norms: int  # of the hidden size, in one layer
    layers: tuple[Layer, ...]
    weights: tuple[Weight, ...]
    config: Any  # of transformers
    tensor_sizes: frozenset[int]  # numbers of processes that its plan for tensor parallelism allows

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def query_width(self) -> int:
        """All query heads together."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """All key heads together; values have as many."""
        return self.num_kv_heads * self.head_dim

    @functools.cached_property
    def _counts(self) -> dict[tuple[str, int | None], int]:
        found: dict[tuple[str, int | None], int] = {}
        for weight in self.weights:
            key = weight.part, weight.layer
            found[key] = found.get(key, 0) + weight.size
        return found

    def count(self, *parts: str, layer: int | None = None) -> int:
        """Weights of some parts (all without a name), of one layer or of everything."""
        return sum(
            size
            for (part, index), size in self._counts.items()
            if (not parts or part in parts) and (layer is None or index == layer)
        )

    @property
    def num_parameters(self) -> int:
        """All weights, tied ones once."""
        return self.count()

    @property
    def num_active_parameters(self) -> int:
        """Weights that multiply one token: no lookup, of the experts those that it is routed to."""
        share = self.experts_per_token / self.num_experts if self.num_experts else 0.0
        head = self.count("embedding") if self.tied else self.count("head")
        return round(head + self.count("attention", "dense", "norm") + share * self.count("experts"))


def facts_of_config(config: Any) -> ModelFacts:
    """The facts of a transformers configuration; the model is built on torch's meta device.

    Raises UnsupportedModelError for what is no causal language model of decoder layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from hearth.models.loading import quiet_transformers

    try:
        with torch.device("meta"), quiet_transformers():
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} cannot be planned for: {str(error).splitlines()[0]}"
        ) from error
    text = config.get_text_config()
    weights = tuple(_weights(model))
    num_layers = text.num_hidden_layers
    found = sorted({weight.layer for weight in weights if weight.layer is not None})
    if found != list(range(num_layers)):
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} cannot be planned for: it has other layers than the "
            f"{num_layers} that its configuration speaks of"
        )
    hidden, heads = text.hidden_size, text.num_attention_heads
    names = [name for name, _ in model.named_parameters()]
    experts = next((value for name in NUM_EXPERTS if (value := getattr(text, name, None))), 0)
    tied = "head" not in {weight.part for weight in weights}
    return ModelFacts(
        model_type=config.model_type,
        hidden_size=hidden,
        vocab_size=text.vocab_size,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        num_experts=experts if any(weight.part == "experts" for weight in weights) else 0,
        experts_per_token=getattr(text, "num_experts_per_tok", None) or 0,
        tied=tied,
        gated=any("gate" in name and "proj" in name for name in names),
        qk_norm=any(name.endswith(("q_norm.weight", "k_norm.weight")) for name in names),
        num_norms=_num_norms(model, hidden),
        layers=tuple(_layer(text, weights, index) for index in range(num_layers)),
        weights=weights,
        config=config,
        tensor_sizes=_tensor_sizes(model, heads),
    )


def facts_of_recipe(recipe: Recipe, workspace: Workspace | None = None) -> ModelFacts:
    """The facts of a recipe's model: ``model.base``, ``model.config`` or ``model.size``.

    A tokenizer of its own counts as large as ``tokenizer.vocab_size`` asks for. Raises ConfigError and
    ModelError for a model that cannot be.
    """
    from hearth.models.building import config_for_section
    from hearth.models.loading import load_config, load_tokenizer
    from hearth.models.reference import resolve_reference

    section = recipe.model
    if section.base is not None:
        config = load_config(resolve_reference(section.base, workspace))
    else:
        vocab_size = recipe.tokenizer.vocab_size
        if recipe.tokenizer.base is not None:
            vocab_size = len(load_tokenizer(resolve_reference(recipe.tokenizer.base, workspace)))
        elif section.config is not None and "vocab_size" in section.config:
            vocab_size = min(vocab_size, int(section.config["vocab_size"]))
        config = config_for_section(section, vocab_size=vocab_size)
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if longest is not None and recipe.data.sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length {recipe.data.sequence_length} exceeds the model's context of {longest}",
            fix=f"use at most {longest}",
        )
    return facts_of_config(config)


def _weights(model: Any) -> Iterable[Weight]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, parameter in model.named_parameters():  # tied ones once, under the input's name
        match = _LAYER.search(name)
        shape = tuple(parameter.shape)
        if match is None:
            if parameter is embedding.weight:
                part = "embedding"
            elif head is not None and parameter is head.weight:
                part = "head"
            else:
                part = "norm" if len(shape) < 2 else "embedding"  # learnt positions
            yield Weight(part, None, shape)
            continue
        if ".experts." in name:
            part = "experts"
        elif len(shape) < 2:
            part = "norm"
        else:
            part = "attention" if "attn" in name or "attention" in name else "dense"
        yield Weight(part, int(match[1]), shape)


def _tensor_sizes(model: Any, heads: int) -> frozenset[int]:
    from hearth.parallel.tensor import require_plan

    found = {1}
    for size in range(2, heads + 1):
        with contextlib.suppress(ConfigError):
            require_plan(model, size)
            found.add(size)
    return frozenset(found)


def _num_norms(model: Any, hidden: int) -> int:
    """Norms of the hidden size in the first layer; their biases, and those of products, do not count."""
    found = 0
    for name, parameter in model.named_parameters():
        match = _LAYER.search(name)
        norm = re.search(r"(norm\w*|ln_?\d*)\.weight$", name)
        found += bool(match and match[1] == "0" and norm and tuple(parameter.shape) == (hidden,))
    return max(1, found)


def _layer(text: Any, weights: tuple[Weight, ...], index: int) -> Layer:
    hidden = text.hidden_size
    mine = [weight for weight in weights if weight.layer == index]
    # A matrix that leads back to the hidden size has the inner width on its other side.
    widths = [
        max(weight.shape) if min(weight.shape) == hidden else min(weight.shape)
        for weight in mine
        if weight.part == "dense" and hidden in weight.shape
    ]
    routers = {getattr(text, name, None) for name in NUM_EXPERTS}
    inner = max((width for width in widths if width not in routers and width > 1), default=0)
    has_experts = any(weight.part == "experts" for weight in mine)
    expert_inner = (
        getattr(text, "moe_intermediate_size", None) or text.intermediate_size if has_experts else 0
    )
    return Layer(inner, expert_inner, _window(text, index))


def _window(text: Any, index: int) -> int | None:
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if not window or (kinds and "sliding" not in kinds[index]):
        return None
    return int(window)
