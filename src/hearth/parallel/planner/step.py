"""The time of an optimizer step: arithmetic, what of the communication shows, and waiting in the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from hearth.parallel.planner.activations import residual_width
from hearth.parallel.planner.collectives import Group, collective_seconds
from hearth.parallel.planner.facts import ModelFacts
from hearth.parallel.planner.hardware import Cluster
from hearth.parallel.planner.job import Job
from hearth.parallel.planner.memory import (
    Plan,
    gathered_bytes,
    has_ends,
    stage_layers,
    state_processes,
    uses_fsdp,
)
from hearth.parallel.planner.schedules import bubble_share
from hearth.parallel.planner.state import Placed, place
from hearth.parallel.planner.work import (
    HOST_BUS,
    HOST_MEMORY,
    UPDATE_BYTES,
    Seconds,
    boundary_bytes,
    head_seconds,
    layer_seconds,
    model_flops_per_token,
    update_seconds,
)

SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, by part; communication as far as nothing hides it."""

    compute: float
    tensor: float
    context: float
    expert: float
    pipeline: float  # activations on their way to the next stage
    bubble: float
    data: float  # gradients and gathered weights
    host: float  # with offload: weights and gradients over the bus, and the update on the processor
    update: float
    tokens: int
    model_flops: float  # of the whole step, as MFU counts them
    peak_flops: float  # of all devices together

    @property
    def seconds(self) -> float:
        """All of it."""
        return (
            self.compute
            + self.tensor
            + self.context
            + self.expert
            + self.pipeline
            + self.bubble
            + self.data
            + self.host
            + self.update
        )

    @property
    def mfu(self) -> float:
        """Share of the data sheet's peak that the model's own arithmetic uses."""
        return self.model_flops / (self.seconds * self.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.seconds

    @property
    def tokens_per_day(self) -> float:
        """Of all devices, without failures (those are hearth.parallel.simulation's)."""
        return self.tokens_per_second * SECONDS_A_DAY

    def parts(self) -> dict[str, float]:
        """Seconds by name."""
        names = ("compute", "tensor", "context", "expert", "pipeline", "bubble", "data", "host", "update")
        return {name: getattr(self, name) for name in names}


def step_time(facts: ModelFacts, job: Job, plan: Plan, cluster: Cluster) -> Step:
    """The time of a step; the plan's batch must divide (``plan.micro_batches(job) > 0``)."""
    layout = plan.layout
    micro_batches = plan.micro_batches(job)
    assert micro_batches > 0, "the layout does not divide the batch"
    tokens = job.micro_batch_size * job.sequence_length / layout.context
    stages = sorted({0, layout.pipeline - 1})
    passes = [_stage_seconds(facts, job, plan, cluster, stage, tokens) for stage in stages]
    slowest = max(passes, key=lambda seconds: seconds.total)
    layers = len(stage_layers(facts, plan, 0))
    tensor = _tensor_seconds(facts, job, plan, cluster, tokens) * layers
    context = _context_seconds(facts, job, plan, cluster, tokens, slowest) * layers
    expert = _expert_seconds(facts, job, plan, cluster, tokens) * layers
    each = slowest.total + tensor + context + expert
    ratio = (each - slowest.forward - tensor / 2) / max(slowest.forward + tensor / 2, 1e-12)
    share = bubble_share(
        plan.schedule,  # type: ignore[arg-type]
        stages=layout.pipeline,
        chunks=plan.chunks,
        micro_batches=micro_batches,
        backward_ratio=ratio,
    )
    send = 0.0
    if layout.pipeline > 1:
        bytes_ = boundary_bytes(facts, job, tokens=tokens) / (layout.tensor if plan.sequence else 1)
        once = collective_seconds("send", bytes_, Group.of(layout, "pipeline"), cluster)
        # Transfers run beside the passes of other micro-batches, but for those that fill and drain.
        send = 2 * plan.chunks * (layout.pipeline - 1) * once
    data, update = _data_seconds(facts, job, plan, cluster, slowest, micro_batches)
    host = 0.0
    if plan.offload:
        host, update = _host_seconds(facts, job, plan, micro_batches), 0.0
    return Step(
        compute=micro_batches * slowest.total,
        tensor=micro_batches * tensor,
        context=micro_batches * context,
        expert=micro_batches * expert,
        pipeline=send,
        bubble=share * micro_batches * each,
        data=data,
        host=host,
        update=update,
        tokens=job.batch_size * job.sequence_length,
        model_flops=model_flops_per_token(facts, job.sequence_length) * job.batch_size * job.sequence_length,
        peak_flops=cluster.device.peak * layout.world_size,
    )


def _stage_seconds(
    facts: ModelFacts, job: Job, plan: Plan, cluster: Cluster, stage: int, tokens: float
) -> Seconds:
    layout, device = plan.layout, cluster.device
    total = Seconds(0.0, 0.0)
    by_kind: dict[object, Seconds] = {}
    for index in stage_layers(facts, plan, stage):
        kind = facts.layers[index]
        if kind not in by_kind:
            by_kind[kind] = layer_seconds(
                facts, index, job, device, tokens=tokens, tensor=layout.tensor, context=layout.context
            )
        total += by_kind[kind]
    if has_ends(plan, stage)[1]:
        total += head_seconds(facts, job, device, tokens=tokens, tensor=layout.tensor)
    return total


def _tensor_seconds(facts: ModelFacts, job: Job, plan: Plan, cluster: Cluster, tokens: float) -> float:
    """Two sums over the tensor group in each pass of a layer (Shoeybi et al. 2019, section 3).

    Half of what is sent are results of products; the other half enters the layer's blocks, and is as wide as
    what is between layers.
    """
    passes = 6 if job.checkpointing == "full" else 4
    size = (job.width + residual_width(job)) / 2 * facts.hidden_size * tokens
    once = collective_seconds("all_reduce", size, Group.of(plan.layout, "tensor"), cluster)
    return passes * once * (1.0 - job.tensor_overlap)


def _context_seconds(
    facts: ModelFacts, job: Job, plan: Plan, cluster: Cluster, tokens: float, passes: Seconds
) -> float:
    """Keys and values go round while attention runs; in the backward pass with their gradients."""
    layout = plan.layout
    if layout.context == 1:
        return 0.0
    size = 2 * job.width * facts.key_width / layout.tensor * tokens * layout.context
    group = Group.of(layout, "context")
    moved = 3 * collective_seconds("all_gather", size, group, cluster)
    hidden = 0.3 * passes.total / max(1, len(stage_layers(facts, plan, 0)))
    return max(0.0, moved - hidden)


def _expert_seconds(facts: ModelFacts, job: Job, plan: Plan, cluster: Cluster, tokens: float) -> float:
    """Tokens go to their experts and back, in all passes, as wide as between layers; nothing hides it."""
    layout = plan.layout
    if layout.expert == 1 or not facts.num_experts:
        return 0.0
    size = residual_width(job) * facts.hidden_size * tokens * facts.experts_per_token
    passes = 6 if job.checkpointing == "full" else 4
    stride = layout.context * layout.tensor
    return passes * collective_seconds("all_to_all", size, Group(layout.expert, stride), cluster)


def _data_seconds(
    facts: ModelFacts, job: Job, plan: Plan, cluster: Cluster, passes: Seconds, micro_batches: int
) -> tuple[float, float]:
    """What shows of gathering weights and adding up gradients; and the time of the update.

    Processes of a sequence share the state where it is shared; otherwise they are replicas.
    """
    layout = plan.layout
    placed = _first_stage(facts, job, plan)
    whole, num_shards = placed.whole, state_processes(job, plan)
    if uses_fsdp(job, plan):
        shard, data = Group.of(layout, "shard", "context"), Group.of(layout, "data")
    else:
        shard, data = Group(1), Group.of(layout, "data", "shard", "context")
    update = update_seconds(
        whole.trainable / num_shards, (whole.optimizer + whole.average) / num_shards, cluster.device
    )
    wire = 2.0 if job.bf16_reduce else 4.0
    exposed = 0.0
    if num_shards > 1:
        gather = collective_seconds("all_gather", gathered_bytes(placed, job), shard, cluster)
        scatter = collective_seconds("reduce_scatter", wire * whole.trainable, shard, cluster)
        layers = max(1, len(stage_layers(facts, plan, 0)))
        if plan.zero == 3:
            exposed += micro_batches * max(gather / layers, gather - passes.forward)
            exposed += micro_batches * max(scatter / layers, gather + scatter - passes.backward)
        else:
            rounds = micro_batches if plan.zero == 2 else 1
            exposed += max(gather / layers, gather - passes.forward)
            exposed += rounds * max(scatter / layers, scatter - passes.backward)
    if data.size > 1:
        size = wire * whole.trainable / num_shards
        reduce = collective_seconds("all_reduce", size, data, cluster)
        exposed += max(reduce / max(1, facts.num_layers), reduce - passes.backward)
    return exposed, update


def _host_seconds(facts: ModelFacts, job: Job, plan: Plan, micro_batches: int) -> float:
    """Weights come over the bus for both passes, gradients go back, and the processor updates its share."""
    share = _first_stage(facts, job, plan).whole.scaled(1 / state_processes(job, plan))
    moved = micro_batches * 4 * (2 * share.values + share.trainable) / HOST_BUS
    updated = (UPDATE_BYTES * share.trainable + 2 * share.optimizer) / HOST_MEMORY
    return moved + updated


def _first_stage(facts: ModelFacts, job: Job, plan: Plan) -> Placed:
    layout = plan.layout
    return place(
        facts,
        job,
        stage_layers(facts, plan, 0),
        first=True,
        last=layout.pipeline == 1,
        tensor=layout.tensor,
        expert=layout.expert,
    )
