"""How much memory the fullest process needs at its peak, and for what.

A step has three moments that may be the peak: the loss (all activations, the output layer's buffers), the end
of the backward pass (all gradients, the embedding's once more) and the update (all gradients, what the
optimizer works with). The memory is that of the largest, part by part.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace

from hearth.config.parallel import ParallelSection
from hearth.parallel.layout import Layout
from hearth.parallel.pipeline import divide_layers
from hearth.parallel.planner.activations import bytes_by_mode, residual_width
from hearth.parallel.planner.facts import Layer, ModelFacts
from hearth.parallel.planner.job import Job
from hearth.parallel.planner.schedules import in_flight
from hearth.parallel.planner.state import Placed, State, place

# As in hearth.training.loss: logits are made for so many values at a time.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
_PARTS_OF_A_CHUNK = 4
_VOCAB_SLICE = 8192
# Without chunks cross-entropy has, for each logit, the result of log_softmax and two gradients in float32.
_WHOLE_LOGIT_BYTES = 12
# Values that 8-bit AdamW works on at a time, and tensors of that many float32 values that it has then.
_CHUNK_8BIT, _TENSORS_8BIT = 1 << 20, 9
# Of a GPU's memory: the context of CUDA and its kernels, and NCCL's buffers for each kind of group.
_CONTEXT_BYTES, _GROUP_BYTES = 1 << 30, 256 << 20
# What an allocator holds but cannot use, because it lies in pieces, as a share of what is allocated: on a GPU
# from torchtitan's rows in docs/planner.md, which are of reserved memory; on a CPU, with the buffers of
# kernels, from the growth of processes that is measured there.
_PIECES = {"cuda": 0.1, "cpu": 0.15}


@dataclass(frozen=True)
class Plan:
    """A way to run a job: a layout and what the recipe's section parallel says besides sizes."""

    layout: Layout
    zero: int = 3
    sequence: bool = False
    schedule: str = "1f1b"
    chunks: int = 1
    offload: bool = False

    @classmethod
    def of(cls, section: ParallelSection, world_size: int) -> Plan:
        """The plan that a recipe asks for. Raises ConfigError when its sizes do not fit the processes."""
        return cls(
            Layout.of(section, world_size),
            section.zero,
            section.sequence,
            section.schedule,
            section.stages,
            section.offload != "none",
        )

    def micro_batches(self, job: Job) -> int:
        """Micro-batches of a process in one step; 0 where the batch is too small for the layout."""
        rows, rest = divmod(job.batch_size, self.layout.batch_ranks)
        return 0 if rest or rows % job.micro_batch_size else int(rows // job.micro_batch_size)


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest process at its peak, by part."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    copies: float  # half-precision copies of weights that autocast makes
    activations: float
    logits: float  # the output layer: its logits, their gradient, gradients of its weight and input
    communication: float  # gathered weights and gradients on their way
    framework: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    @property
    def tensors(self) -> float:
        """What the program allocates, without the framework's own."""
        return self.total - self.framework

    def parts(self) -> dict[str, float]:
        """Bytes by name."""
        return dict(vars(self))


def memory_of(facts: ModelFacts, job: Job, plan: Plan, *, device: str = "cuda") -> Memory:
    """The memory of the fullest process. ``device``: cuda or cpu, which decides the chunks of the loss."""
    stages = range(plan.layout.pipeline)
    ends = [stages[0], stages[-1]] if len(stages) > 1 else [0]
    return max((_memory_of_stage(facts, job, plan, stage, device) for stage in ends), key=lambda m: m.total)


def stage_layers(facts: ModelFacts, plan: Plan, stage: int) -> tuple[int, ...]:
    """The layers of a pipeline process: its pieces go round."""
    return _stage_layers(facts.num_layers, plan.layout.pipeline, plan.chunks, stage)


@functools.lru_cache(maxsize=4096)
def _stage_layers(num_layers: int, pipeline: int, chunks: int, stage: int) -> tuple[int, ...]:
    pieces = divide_layers(num_layers, pipeline * chunks)
    return tuple(layer for piece in pieces[stage::pipeline] for layer in piece)


@functools.lru_cache(maxsize=4096)
def _kinds(facts: ModelFacts, layers: tuple[int, ...]) -> tuple[tuple[Layer, int], ...]:
    """Kinds of layers, and how many there are of each."""
    return tuple(Counter(facts.layers[index] for index in layers).items())


def has_ends(plan: Plan, stage: int) -> tuple[bool, bool]:
    """Whether a stage has the embedding, and whether it has the output layer."""
    return stage == 0, stage == plan.layout.pipeline - 1


def _memory_of_stage(facts: ModelFacts, job: Job, plan: Plan, stage: int, device: str) -> Memory:
    layers = stage_layers(facts, plan, stage)
    first, last = has_ends(plan, stage)
    layout = plan.layout
    placed = place(facts, job, layers, first=first, last=last, tensor=layout.tensor, expert=layout.expert)
    held, comm = _held(placed, job, plan)
    whole = placed.whole
    head = _head_buffers(facts, job, plan, device) if last else _Head()
    kept_head = head.kept if facts.tied else 0.0  # until the embedding's gradient is added to it
    embedding = 4.0 * _words(facts, job, plan) * facts.hidden_size if first and job.adapter is None else 0.0
    copies = 2.0 * _copied(placed, job, plan)
    early = held.gradients if plan.micro_batches(job) > 1 else 0.0
    acts = _activations(facts, job, plan, stage, layers, first=first, last=last)
    passing = _transient(facts, job, plan, layers)
    again = passing + _one_layer(facts, job, plan, layers)
    update = _update(job, whole) / state_processes(job, plan)
    # Gradients, copies, activations, logits, communication: while logits are made, in the last layer's
    # backward pass, in the first layer's and the embedding's, and in the update.
    moments = [
        (early, copies, acts, head.forward, comm.forward),
        (early, copies if job.checkpointing == "none" else 0.0, acts + again, kept_head, comm.backward),
        (held.gradients + embedding, 0.0, passing, kept_head, comm.backward),
        (held.gradients, 0.0, update, 0.0, comm.always),
    ]
    gradients, copies, activations, logits, communication = max(moments, key=sum)
    found = Memory(
        weights=held.weights,
        gradients=gradients,
        optimizer=held.optimizer,
        average=held.average,
        copies=copies,
        activations=activations,
        logits=logits,
        communication=communication,
        framework=0.0,
    )
    return replace(found, framework=_framework(plan, device, found.tensors))


def _copied(placed: Placed, job: Job, plan: Plan) -> float:
    """Weights of which autocast keeps a half-precision copy until their backward pass: all matrices.

    Weights that are gathered come in half precision, but for those of layers with experts.
    """
    if job.width == 4 or job.bf16_state:
        return 0.0
    if not uses_fsdp(job, plan):
        return placed.whole.matrices
    return 0.0 if job.gathers_bf16 else placed.mixed.matrices


def gathered_bytes(placed: Placed, job: Job) -> float:
    """What a process has of a stage's weights once all are gathered: what the wires carry.

    Weights of layers come in the type of autocast, but for layers with experts, of whose products autocast
    knows nothing; embedding and output layer come as they are (hearth.parallel.sharding).
    """
    if job.gathers_bf16 or job.bf16_state:
        return 2.0 * placed.whole.values
    exact = placed.mixed.values + placed.ends.values
    return layer_width(job, experts=False) * (placed.whole.values - exact) + 4.0 * exact


def layer_width(job: Job, *, experts: bool) -> float:
    """Bytes of a gathered weight of a layer."""
    halved = job.gathers_bf16 or job.bf16_state or (job.width < 4 and not experts)
    return 2.0 if halved else 4.0


@dataclass(frozen=True)
class _Communication:
    always: float = 0.0
    forward: float = 0.0
    backward: float = 0.0


def _held(placed: Placed, job: Job, plan: Plan) -> tuple[State, _Communication]:
    """What stays from step to step after ZeRO has divided it, and what is gathered on the way."""
    layout = plan.layout
    whole = placed.whole
    shard = state_processes(job, plan)
    if not uses_fsdp(job, plan):
        return whole, _Communication()
    own = (placed.dense + placed.ends).scaled(1 / shard)
    # Experts are divided already; the replicas of a part of them share it, too.
    replicas = layout.batch_ranks / layout.expert if layout.expert > 1 else shard
    own = own + placed.experts.scaled(1 / replicas)
    width = 2.0 if job.gathers_bf16 or job.bf16_state else 4.0
    layer, ends = placed.largest_layer, placed.ends
    inside = layer_width(job, experts=placed.largest_is_mixed)
    gathered = gathered_bytes(placed, job)
    # Stage 3: a layer, the next one that is gathered meanwhile, embedding and output layer all the time.
    forward = 2 * inside * layer.values + width * ends.values if plan.zero == 3 else gathered
    # Gradients of a layer as they come, and once more in the buffer that is sent.
    grads = 4.0 * (2 * layer.trainable + 2 * ends.trainable)
    if plan.zero == 1 and plan.micro_batches(job) > 1:
        own.gradients += whole.gradients  # whole until the last micro-batch
        grads = 4.0 * layer.trainable
    always = gathered if plan.zero < 3 and not job.bf16_state else width * ends.values
    if plan.offload:
        own = State(largest=own.largest)
    return own, _Communication(always, forward, forward + grads)


def uses_fsdp(job: Job, plan: Plan) -> bool:
    """Whether weights are gathered before they are used: shared ones, and replicas of parts."""
    layout = plan.layout
    if layout.shard > 1 or plan.offload or (job.context_always_shares and layout.context > 1):
        return True
    return layout.data * layout.context > 1 and max(layout.tensor, layout.pipeline, layout.expert) > 1


def state_processes(job: Job, plan: Plan) -> int:
    """How many processes share the state of a replica: those of a sequence are among them."""
    return plan.layout.shard * plan.layout.context if uses_fsdp(job, plan) else 1


def _local_tokens(job: Job, plan: Plan) -> float:
    return job.micro_batch_size * job.sequence_length / plan.layout.context


def _words(facts: ModelFacts, job: Job, plan: Plan) -> float:
    return facts.vocab_size / (plan.layout.tensor if job.vocabulary_split else 1)


def _activations(
    facts: ModelFacts, job: Job, plan: Plan, stage: int, layers: tuple[int, ...], *, first: bool, last: bool
) -> float:
    layout, tokens = plan.layout, _local_tokens(job, plan)
    per_token = sum(
        number * bytes_by_mode(facts, layer, job.one_row, layout.tensor, plan.sequence)[0][job.checkpointing]
        for layer, number in _kinds(facts, layers)
    )
    micro_batches = max(1, plan.micro_batches(job))
    flying = in_flight(
        plan.schedule,  # type: ignore[arg-type]
        stage=stage,
        stages=layout.pipeline,
        chunks=plan.chunks,
        micro_batches=micro_batches,
    )
    res = residual_width(job) * facts.hidden_size
    if layout.pipeline > 1:
        per_token += plan.chunks * res  # the result of a stage is kept with its input
    found = flying * per_token * tokens
    if last:
        found += 2 * res * tokens  # the last norm
    if first:
        found += 8 * tokens + (job.sequence_length * tokens if job.isolated else 0)  # ids, one boolean mask
    if layout.context > 1:
        found += 4 * tokens * facts.key_width / layout.tensor * job.width  # keys and values on the way
    if layout.expert > 1:
        found += 2 * tokens * facts.experts_per_token * facts.hidden_size * residual_width(job)
    return found


def _one_layer(facts: ModelFacts, job: Job, plan: Plan, layers: tuple[int, ...]) -> float:
    """What a layer has while it is run again in the backward pass."""
    largest = max(
        bytes_by_mode(facts, layer, job.one_row, plan.layout.tensor, plan.sequence)[1][job.checkpointing]
        for layer, _ in _kinds(facts, layers)
    )
    return largest * _local_tokens(job, plan)


def _transient(facts: ModelFacts, job: Job, plan: Plan, layers: tuple[int, ...]) -> float:
    """Gradients of activations in a feed-forward's backward pass: three of its width, two of the model's."""
    inner = 0.0
    for layer, _ in _kinds(facts, layers):
        wide = layer.inner * job.width + facts.experts_per_token * layer.expert_inner * residual_width(job)
        inner = max(inner, wide / plan.layout.tensor)
    per_token = 3 * inner + 2 * residual_width(job) * facts.hidden_size
    return per_token * _local_tokens(job, plan)


@dataclass(frozen=True)
class _Head:
    forward: float = 0.0  # at the most while logits are made
    kept: float = 0.0  # until the backward pass takes it


def _head_buffers(facts: ModelFacts, job: Job, plan: Plan, device: str) -> _Head:
    """The output layer (hearth.training.loss): logits of a chunk, and both gradients with the loss."""
    tokens, words, hidden = _local_tokens(job, plan), _words(facts, job, plan), facts.hidden_size
    res, trained = residual_width(job), job.adapter is None
    if not job.chunked_loss:
        return _Head(_WHOLE_LOGIT_BYTES * tokens * words, 0.0)
    elements = _CHUNK_ELEMENTS.get(device, 1 << 24)
    part = max(64, min(tokens, elements // words))
    chunk = min(tokens, _PARTS_OF_A_CHUNK * part)
    halved = job.width < res
    logits = job.width * chunk * words + (4 * part * words if job.width < 4 else 0)
    inputs = 2 * res * tokens * hidden + (
        job.width * tokens * hidden if halved else 0
    )  # all, those that count
    weight = job.width * words * hidden if halved else 0
    grad_input = res * tokens * hidden
    grad_weight = 4 * words * hidden if trained else 0
    product = job.width * min(words, _VOCAB_SLICE) * hidden if job.width < 4 and trained else 0
    product = max(product, job.width * chunk * hidden)
    return _Head(logits + inputs + weight + grad_input + grad_weight + product, grad_weight)


def _update(job: Job, whole: State) -> float:
    """What the optimizer works with besides weights, gradients and state."""
    match job.optimizer:
        case "lion":
            return 4 * whole.largest
        case "adafactor":
            return 3 * 4 * whole.largest
        case "muon":
            return (2 * 5 + 4) * whole.largest
        case "adamw8bit":
            return 4 * _TENSORS_8BIT * min(_CHUNK_8BIT, whole.largest)
    return 0.0


def _framework(plan: Plan, device: str, tensors: float) -> float:
    pieces = _PIECES[device] * tensors
    if device == "cpu":
        return pieces
    groups = sum(size > 1 for size in plan.layout.sizes)
    return _CONTEXT_BYTES + groups * _GROUP_BYTES + pieces
