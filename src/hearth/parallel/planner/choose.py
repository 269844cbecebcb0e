"""All layouts that a job could have, those that fit, the fastest, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.models.sizes import format_count
from hearth.parallel.checks import check_micro_batches
from hearth.parallel.layout import Layout
from hearth.parallel.planner.facts import ModelFacts
from hearth.parallel.planner.hardware import Cluster
from hearth.parallel.planner.job import Checkpointing, Job
from hearth.parallel.planner.legal import check_section, is_legal, takes_rows
from hearth.parallel.planner.memory import Memory, Plan, memory_of
from hearth.parallel.planner.step import Step, step_time

# Of the memory of a device the planner fills so much; the rest is for what its formulas do not know.
FILLED = 0.95
# Among layouts whose steps are this close the simplest is taken: the estimate is not better than that.
_CLOSE = 1.05
# Sequences from this length on may be cut over processes.
_LONG = 16_384
_MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Choice:
    """One way to run the job, with what it needs and how long it takes."""

    plan: Plan
    job: Job
    memory: Memory
    step: Step

    @property
    def complexity(self) -> tuple[int, ...]:
        """Less is simpler: kinds of parallelism first, then what ZeRO divides, then recomputation."""
        layout = self.plan.layout
        kinds = [layout.pipeline, layout.context, layout.tensor, layout.shard, layout.expert]
        zero = self.plan.zero if layout.shard > 1 else 0
        return (
            int(self.plan.offload),
            sum(size > 1 for size in kinds),
            self.plan.chunks,
            int(self.plan.sequence),
            zero,
            _MODES.index(self.job.checkpointing),
        )


@dataclass(frozen=True)
class Planning:
    """What the planner found."""

    facts: ModelFacts
    job: Job
    cluster: Cluster
    choices: tuple[Choice, ...]  # those that fit, the best first
    num_legal: int
    reasons: tuple[str, ...] = field(default=())

    @property
    def chosen(self) -> Choice:
        """The one to take."""
        return self.choices[0]


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def tensor_sizes(facts: ModelFacts, job: Job, largest: int) -> list[int]:
    """Sizes that the model's plan allows and that divide every inner width; adapters are not cut."""
    if job.adapter is not None:
        return [1]
    widths = [facts.num_heads, facts.num_kv_heads]
    widths += [layer.inner for layer in facts.layers] + [layer.expert_inner for layer in facts.layers]
    common = math.gcd(*(width for width in widths if width))
    return [size for size in divisors(common) if size <= largest and size in facts.tensor_sizes]


def pipeline_sizes(facts: ModelFacts, job: Job, num_devices: int) -> list[int]:
    """Numbers of stages; tied embeddings would be in two of them, and adapters are not cut."""
    if facts.tied or job.adapter is not None:
        return [1]
    return [size for size in divisors(num_devices) if size <= facts.num_layers]


def legal_layouts(facts: ModelFacts, job: Job, cluster: Cluster) -> Iterator[Layout]:
    """Every layout over all devices in which sizes divide what they cut.

    Tensor and context groups stay within a node, where the wire is quick; a shard group is a node, the whole
    of what is left, or nothing.
    """
    total = cluster.num_devices
    contexts = [1]
    if job.sequence_length >= _LONG:
        contexts += [size for size in divisors(cluster.per_node)[1:] if job.sequence_length % (2 * size) == 0]
    for tensor in tensor_sizes(facts, job, cluster.per_node):
        for pipeline in pipeline_sizes(facts, job, total):
            for context in contexts:
                inner = tensor * pipeline * context
                if total % inner or tensor * context > cluster.per_node:
                    continue
                rest = total // inner
                near = cluster.per_node // (tensor * context)
                for shard in sorted({1, rest, *(size for size in divisors(rest) if size == near)}):
                    for expert in _expert_sizes(facts, rest):
                        yield Layout(rest // shard, shard, tensor, pipeline, context, expert)


def _expert_sizes(facts: ModelFacts, ranks: int) -> list[int]:
    if not facts.num_experts:
        return [1]
    return [size for size in divisors(facts.num_experts) if ranks % size == 0]


def legal_plans(facts: ModelFacts, job: Job, cluster: Cluster, *, offload: bool = False) -> Iterator[Plan]:
    """The layouts with every stage of ZeRO, every schedule, with and without sequence parallelism.

    Without those that a run would be refused for.
    """
    for plan in _plans(facts, job, cluster, offload=offload):
        if is_legal(facts, job, plan):
            yield plan


def _plans(facts: ModelFacts, job: Job, cluster: Cluster, *, offload: bool) -> Iterator[Plan]:
    for layout in legal_layouts(facts, job, cluster):
        schedules = [("1f1b", 1)]
        if layout.pipeline > 1 and facts.num_layers >= 2 * layout.pipeline:
            schedules += [("interleaved", 2), ("zero_bubble", 2)]
        for zero in (1, 2, 3) if layout.shard > 1 else (3,):
            for schedule, chunks in schedules:
                for sequence in (False, True) if layout.tensor > 1 else (False,):
                    yield Plan(layout, zero, sequence, schedule, chunks, offload)


def micro_batch_sizes(job: Job, plan: Plan) -> list[int]:
    """Powers of two, and the recipe's own, that divide the rows of a process."""
    rows, rest = divmod(job.batch_size, plan.layout.batch_ranks)
    if rest or not rows:
        return []
    powers = {1 << power for power in range(rows.bit_length())}
    sizes = [size for size in sorted(powers | {job.micro_batch_size}) if rows % size == 0 and size <= 64]
    return [size for size in sizes if takes_rows(job.with_(micro_batch_size=size), plan)]


def find_choices(
    facts: ModelFacts,
    job: Job,
    cluster: Cluster,
    *,
    device: str = "cuda",
    offload: bool = False,
    modes: tuple[Checkpointing, ...] | None = None,
) -> tuple[list[Choice], int]:
    """All that fit, the fastest first, and how many layouts were legal at all.

    ``modes``: kinds of activation checkpointing that may be used; default: the job's own and those that save
    more. For each plan the fastest size of the micro-batch that fits is kept.
    """
    room = FILLED * cluster.device.memory
    allowed = modes or _MODES[_MODES.index(job.checkpointing) :]
    found: list[Choice] = []
    legal = 0
    jobs: dict[tuple[int, str], Job] = {}
    for plan in legal_plans(facts, job, cluster, offload=offload):
        best: Choice | None = None
        for micro in micro_batch_sizes(job, plan):
            for mode in allowed:
                own = jobs.get((micro, mode)) or job.with_(micro_batch_size=micro, checkpointing=mode)
                jobs[micro, mode] = own
                memory = memory_of(facts, own, plan, device=device)
                legal += 1
                if memory.total > room:
                    continue
                choice = Choice(plan, own, memory, step_time(facts, own, plan, cluster))
                if best is None or choice.step.seconds < best.step.seconds:
                    best = choice
                break  # more recomputation is only slower
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda choice: choice.step.seconds), legal


def choose(facts: ModelFacts, job: Job, cluster: Cluster, *, device: str = "cuda") -> Planning:
    """The best layout: the simplest of those whose step takes within 5 % of the fastest.

    Host memory is used for weights and optimizer state only where nothing fits without. Raises ConfigError
    where nothing fits at all, with what would make it fit.
    """
    from hearth.parallel.planner.explain import explain
    from hearth.parallel.planner.refusal import refuse

    found, legal = find_choices(facts, job, cluster, device=device)
    if not found:
        found, more = find_choices(facts, job, cluster, device=device, offload=True)
        legal += more
    if legal == 0:
        raise ConfigError(
            f"train.batch_size {job.batch_size} cannot be divided over {cluster.num_devices} devices: no way "
            f"to cut the {facts.model_type} model leaves rows for each of its replicas, and as many "
            f"micro-batches as a pipeline has stages",
            fix=f"use a multiple of {cluster.num_devices}, or fewer devices",
        )
    if not found:
        refuse(facts, job, cluster, device=device)
    fastest = found[0].step.seconds
    close = [choice for choice in found if choice.step.seconds <= _CLOSE * fastest]
    chosen = min(close, key=lambda choice: (*choice.complexity, choice.step.seconds))
    ordered = (chosen, *(choice for choice in found if choice is not chosen))
    planning = Planning(facts, job, cluster, ordered, legal)
    return Planning(facts, job, cluster, ordered, legal, tuple(explain(planning)))


def as_it_stands(planning: Planning, section: ParallelSection, *, device: str = "cuda") -> Choice:
    """The recipe's own layout and settings. Raises ConfigError where they cannot be or do not fit."""
    from hearth.parallel.planner.refusal import check_fits

    job, cluster = planning.job, planning.cluster
    plan = Plan.of(section, cluster.num_devices)
    check_section(planning.facts, job, section, plan.layout)
    if not plan.micro_batches(job):
        raise ConfigError(
            f"train.batch_size {job.batch_size} is no multiple of micro_batch_size {job.micro_batch_size} x "
            f"{plan.layout.batch_ranks} processes with rows of their own"
        )
    check_micro_batches(section, plan.micro_batches(job))
    memory = check_fits(planning.facts, job, plan, memory_bytes=cluster.device.memory, device=device)
    return Choice(plan, job, memory, step_time(planning.facts, job, plan, cluster))


def describe_size(facts: ModelFacts) -> str:
    """``8.03B parameters``, with those of a token where experts are chosen."""
    text = f"{format_count(facts.num_parameters)} parameters"
    if facts.num_experts:
        text += f", {format_count(facts.num_active_parameters)} of them for each token"
    return text
