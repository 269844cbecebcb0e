"""What a decoder layer keeps for its backward pass, tensor by tensor.

The list was read off real models with torch's saved-tensor hooks (`tests/parallel/planner` repeats that). It
is the list of Korthikanti et al. 2022, "Reducing activation recomputation", section 4.1, for today's layers:
gated feed-forward, RMS norms, attention that keeps no scores, no dropout; and for autocast, where norms and
the residual stream are float32 and every linear layer keeps its own copy of its input in half precision.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hearth.parallel.planner.facts import Layer, ModelFacts
from hearth.parallel.planner.job import Job


@dataclass(frozen=True)
class Saved:
    """A kind of tensor that is kept, under some modes of activation checkpointing."""

    name: str
    bytes_per_token: float
    kept_by: frozenset[str]


_NONE, _SELECTIVE = frozenset({"none"}), frozenset({"selective"})


def residual_width(job: Job) -> int:
    """Bytes of a value between layers: autocast leaves them in float32."""
    return job.width if job.gathers_bf16 or job.bf16_state else 4


def saved_by_layer(
    facts: ModelFacts, layer: Layer, job: Job, *, tensor: int = 1, sequence: bool = False
) -> list[Saved]:
    """Everything a layer keeps for one token, by mode. ``tensor``: processes that share each product.

    Tensor parallelism divides heads and the inner width; what has the hidden size is whole in every process,
    but for norms under sequence parallelism (Korthikanti et al. 2022, section 4.2.2).
    """
    w, res = job.width, residual_width(job)
    split = tensor if sequence else 1
    hidden = facts.hidden_size
    queries, keys = facts.query_width / tensor, facts.key_width / tensor
    heads = facts.num_heads / tensor
    has_mask = job.isolated or (layer.window is not None and layer.window < job.sequence_length)
    # A mask keeps torch from sharing keys between queries: they are repeated for every head.
    repeated = queries if has_mask else keys
    copies = w < res  # each linear layer makes a half-precision input of its own
    experts = facts.experts_per_token if layer.expert_inner else 0
    inner = layer.inner / tensor
    own = [
        Saved("input of the layer", res * hidden / split, frozenset({"selective", "full"})),
        Saved("norms", 2 * res * facts.num_norms * hidden / split + 4 * facts.num_norms, _NONE),
        Saved("inputs of q, k, v", w * hidden * (3 if copies else 1), _NONE),
        Saved("queries, keys, values", w * (queries + 2 * repeated), _NONE),
        Saved("result of attention", w * queries + 4 * heads, _NONE | _SELECTIVE),
        Saved("products q, k, v, o", w * (queries + 2 * keys + hidden), _SELECTIVE),
    ]
    if job.alternate_products:
        own[-1] = Saved("products q, v", w * (queries + keys), _SELECTIVE)
    if facts.qk_norm:
        each = (res + (w if copies else res)) if w < 4 else 2 * w
        own.append(Saved("norms of q and k", each * (queries + keys) + 4 * (heads + heads), _NONE))
    if has_mask:
        own.append(Saved("mask as numbers", float(w * job.sequence_length), _NONE))
    if job.eager_attention:
        own.append(Saved("scores and probabilities", 5.0 * job.sequence_length * heads, _NONE))
    if inner:
        matrices = 2 if facts.gated else 1
        own += [
            Saved("inputs of the feed-forward", w * hidden * (matrices if copies else 1), _NONE),
            Saved("inside of the feed-forward", w * inner * (4 if facts.gated else 2), _NONE),
        ]
        products = w * (matrices * inner + hidden)
        if job.alternate_products:
            products = w * (inner + hidden)
        own.append(Saved("products of the feed-forward", products, _SELECTIVE))
    if experts:
        # Grouped products of experts are not cast by autocast.
        wide = res
        width = layer.expert_inner / tensor
        own += [
            Saved("input of the router", w * hidden + 12.0 * facts.num_experts, _NONE),
            Saved("tokens of the experts", experts * wide * 2.0 * hidden, _NONE),
            Saved("inside of the experts", experts * wide * 4.0 * width, _NONE),
            Saved("products of the experts", experts * wide * (2 * width + hidden), _SELECTIVE),
            Saved("routes", 40.0 * experts, _NONE | _SELECTIVE),
        ]
    return own


@functools.lru_cache(maxsize=4096)
def bytes_by_mode(
    facts: ModelFacts, layer: Layer, job: Job, tensor: int, sequence: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """For one token and each mode of checkpointing: what a layer keeps, and what it has while it runs again.

    ``job``: `Job.one_row`, as cuts of a step change nothing here.
    """
    saved = saved_by_layer(facts, layer, job, tensor=tensor, sequence=sequence)
    modes = ("none", "selective", "full")
    return (
        {mode: layer_bytes(saved, mode) for mode in modes},
        {mode: recomputed_bytes(saved, mode) for mode in modes},
    )


def layer_bytes(saved: list[Saved], mode: str) -> float:
    """Bytes for one token under a mode of activation checkpointing."""
    return sum(tensor.bytes_per_token for tensor in saved if mode in tensor.kept_by)


def recomputed_bytes(saved: list[Saved], mode: str) -> float:
    """What a layer has besides for one token while it runs again: all, less what selective has kept."""
    whole = layer_bytes(saved, "none")
    if mode == "none":
        return 0.0
    if mode == "full":
        return whole
    kept = {"result of attention": 1.0, "inside of the feed-forward": 0.5, "inside of the experts": 0.5}
    return whole - sum(tensor.bytes_per_token * kept.get(tensor.name, 0.0) for tensor in saved)
