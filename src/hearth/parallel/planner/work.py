"""Arithmetic and memory traffic of a step, by part."""

from __future__ import annotations

from dataclasses import dataclass

from hearth.parallel.planner.activations import layer_bytes, residual_width, saved_by_layer
from hearth.parallel.planner.facts import Layer, ModelFacts
from hearth.parallel.planner.hardware import Device
from hearth.parallel.planner.job import Job

# Share of the best rate of a product that those of a model reach: its matrices are not the best shapes, and
# devices that are busy for long run slower than in a short measurement. One number for every device and
# model, the round one that is nearest to all published runs in docs/planner.md together.
PRODUCT_EFFICIENCY = 0.8
# Attention runs at about half the rate of products (Dao 2023, "FlashAttention-2", figures 4 to 7; Shah et al.
# 2024, "FlashAttention-3", figure 5, for version 2 on an H100: 35 to 40 % of the peak).
ATTENTION_EFFICIENCY = 0.5
# Its backward pass has five products where the forward pass has two (Dao 2023, section 3.1).
_ATTENTION_BACKWARD = 2.5
# Bytes that cross the memory bus in a step for each byte that a layer keeps, counted at every operator of a
# layer (Qwen3 and Llama, forward and backward, without products and attention; a third of it forward): 12 to
# 14 under autocast, which converts to and fro, 8 to 9 without. Compiled code fuses chains of operators: a
# kept value is written, read by what follows and by the backward pass, and its gradient written.
_CROSSINGS_AUTOCAST, _CROSSINGS_PLAIN, _CROSSINGS_COMPILED = 12.0, 8.0, 4.0
MEMORY_EFFICIENCY = 0.8
# Kernels of a layer in a step, forward and backward.
_KERNELS = {False: 180, True: 45}
# Bytes that an update moves for a weight besides the state: weight and gradient read, weight written, and the
# gradient twice for its norm and its clipping.
UPDATE_BYTES = 4 * 6
# With offload, for one device: its bus to the host (PCIe 4 x16, of which 80 % are reached), and its share of
# the host's memory bandwidth (two sockets of eight DDR5-4800 channels, 614 GB/s, half of it reached, over 8).
HOST_BUS, HOST_MEMORY = 25e9, 38e9


@dataclass(frozen=True)
class Seconds:
    """Time of one micro-batch's passes through something."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.forward + other.forward, self.backward + other.backward)


def model_flops_per_token(facts: ModelFacts, sequence_length: int) -> float:
    """6 P + 6 L H D T, the formula of hearth.models.flops: no lookup, causal half, nothing recomputed."""
    attention = 0.0
    for layer in facts.layers:
        span = min(sequence_length, 2 * layer.window) if layer.window else sequence_length
        attention += facts.query_width * span
    return 6.0 * facts.num_active_parameters + 6.0 * attention


def layer_seconds(
    facts: ModelFacts, index: int, job: Job, device: Device, *, tokens: float, tensor: int, context: int = 1
) -> Seconds:
    """Passes of ``tokens`` positions of a process through one layer, of which it has a part in ``tensor``."""
    layer = facts.layers[index]
    share = facts.experts_per_token / facts.num_experts if facts.num_experts else 0.0
    dense = facts.count("attention", "dense", layer=index) / tensor
    routed = share * facts.count("experts", layer=index) / tensor
    product = 2 * tokens * (dense + routed) / product_rate(job, device)
    attention = 2 * tokens * facts.query_width / tensor * _span(job, layer, context)
    attention /= device.attention or ATTENTION_EFFICIENCY * _best_rate(job, device)
    again = recomputed_share(facts, layer, job)
    attention_again = attention if job.checkpointing == "full" else 0.0
    saved = saved_by_layer(facts, layer, job.with_(isolated=False), tensor=tensor)
    traffic = tokens * layer_bytes(saved, "none") * _crossings(job)
    moved = traffic / (MEMORY_EFFICIENCY * device.bandwidth)
    forward = product + attention + moved / 3
    backward = (2 + again) * product + _ATTENTION_BACKWARD * attention + attention_again + 2 / 3 * moved
    backward += moved / 3 if job.checkpointing != "none" else 0.0
    launches = device.launch * _KERNELS[job.compiled]
    if device.link == "local":  # a CPU starts the next operator when the last is done
        return Seconds(forward + launches / 3, backward + 2 / 3 * launches)
    return Seconds(max(forward, launches / 3), max(backward, launches * 2 / 3))


def _crossings(job: Job) -> float:
    if job.compiled:
        return _CROSSINGS_COMPILED
    return _CROSSINGS_AUTOCAST if job.width < residual_width(job) else _CROSSINGS_PLAIN


def product_rate(job: Job, device: Device) -> float:
    """FLOP/s of the matrix products of a model."""
    best = _best_rate(job, device)
    if job.precision == "fp8" and device.fp8_matmul is not None:
        best = device.fp8_matmul
    return PRODUCT_EFFICIENCY * best


def _best_rate(job: Job, device: Device) -> float:
    """What is not computed in 8 bits: in half precision, or in float32 where that is the job's."""
    return device.fp32 if job.precision == "fp32" and device.fp32 is not None else device.matmul


def recomputed_share(facts: ModelFacts, layer: Layer, job: Job) -> float:
    """How much of a layer's products runs a second time."""
    if job.checkpointing == "full":
        return 1.0
    if job.checkpointing == "selective" and job.alternate_products:
        keys, hidden = facts.key_width, facts.hidden_size
        again = hidden * keys + facts.query_width * hidden + layer.inner * hidden
        return again / (2 * hidden * (facts.query_width + keys) + 3 * hidden * layer.inner)
    return 0.0


def head_seconds(facts: ModelFacts, job: Job, device: Device, *, tokens: float, tensor: int) -> Seconds:
    """The output layer and the loss: three products, all in the forward pass where logits come in chunks."""
    words = facts.vocab_size / (tensor if job.vocabulary_split else 1)
    product = 2 * tokens * words * facts.hidden_size / (PRODUCT_EFFICIENCY * _best_rate(job, device))
    moved = tokens * words * 4 * 6 / (MEMORY_EFFICIENCY * device.bandwidth)
    if device.link == "local":
        moved /= 2  # a chunk stays in the cache
    if job.chunked_loss:
        return Seconds(3 * product + moved, 0.0)
    return Seconds(product + moved / 2, 2 * product + moved / 2)


def update_seconds(num_weights: float, state_bytes: float, device: Device) -> float:
    """An update of so many weights: memory traffic, with their state read and written."""
    moved = UPDATE_BYTES * num_weights + 2 * state_bytes
    return moved / (MEMORY_EFFICIENCY * device.bandwidth)


def boundary_bytes(facts: ModelFacts, job: Job, *, tokens: float) -> float:
    """Bytes of the activations between two layers."""
    return residual_width(job) * facts.hidden_size * tokens


def _span(job: Job, layer: Layer, context: int) -> float:
    """Positions that a token is compared with: the causal half, or all where a mask decides."""
    length = float(job.sequence_length)
    if layer.window is not None:
        length = min(length, 2.0 * layer.window)
    if job.eager_attention or (job.isolated and context == 1):
        return 2 * length
    return length
