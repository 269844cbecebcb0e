"""A run that cannot fit is refused, with the change that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

from hearth.errors import ConfigError
from hearth.parallel.planner.choose import FILLED, describe_size, legal_plans
from hearth.parallel.planner.facts import ModelFacts
from hearth.parallel.planner.hardware import GIB, Cluster
from hearth.parallel.planner.job import Job
from hearth.parallel.planner.legal import is_legal, takes_rows
from hearth.parallel.planner.memory import Memory, Plan, memory_of

# Further than this no fix is looked for.
_MOST_DEVICES, _SHORTEST = 8192, 128
# How far off the tensors may be. Measured for one process: 0.2 %; published runs of many processes have
# reserved at least 6 % more than the tensors that are counted (docs/planner.md).
_ERROR = 0.05


def refuse(facts: ModelFacts, job: Job, cluster: Cluster, *, device: str = "cuda") -> NoReturn:
    """Raise ConfigError: no layout over these devices fits. Its fix was tried, and fits."""
    least = min(
        (
            memory_of(facts, job.with_(micro_batch_size=1, checkpointing="full"), plan, device=device)
            for offload in (False, True)
            for plan in legal_plans(facts, job, cluster, offload=offload)
        ),
        key=lambda memory: memory.total,
    )
    name, size = _largest(least)
    raise ConfigError(
        f"{describe_size(facts)} with {job.optimizer} and rows of {job.sequence_length:,} tokens do not fit "
        f"{cluster.num_devices} x {cluster.device.memory / GIB:.1f} GiB in any layout: the least that a "
        f"process needs is {least.total / GIB:.1f} GiB, of which {name} {size / GIB:.1f} GiB",
        fix=_fix(facts, job, cluster, device),
    )


def check_fits(
    facts: ModelFacts,
    job: Job,
    plan: Plan,
    *,
    memory_bytes: int,
    device: str = "cuda",
    certain: bool = False,
) -> Memory:
    """The memory of a run as its recipe says it. Raises ConfigError where it is more than a device has.

    ``certain``: refuse only what no error of the estimate explains, where the tensors alone are more than the
    whole memory. The fix is the first of these that is enough: recomputing activations, a smaller
    micro-batch, sharing weights, an optimizer with less state, the memory of the host.
    """
    memory = memory_of(facts, job, plan, device=device)
    room = FILLED * memory_bytes
    if memory.total <= room or (certain and (1 - _ERROR) * memory.tensors <= memory_bytes):
        return memory
    name, size = _largest(memory)
    raise ConfigError(
        f"this run does not fit: a process needs {memory.total / GIB:.1f} GiB, and {FILLED:.0%} of "
        f"{memory_bytes / GIB:.1f} GiB may be planned; {name} alone are {size / GIB:.1f} GiB",
        fix=_change_that_fits(facts, job, plan, room, device),
    )


def _change_that_fits(facts: ModelFacts, job: Job, plan: Plan, room: float, device: str) -> str:
    for text, other_job, other_plan in _changes(job, plan):
        if takes_rows(job, plan) and not takes_rows(other_job, other_plan):
            continue
        if not is_legal(facts, other_job, other_plan):
            continue  # a run would be refused for it
        if other_plan.offload and device == "cpu":
            continue  # the memory of the host is what there is too little of
        if memory_of(facts, other_job, other_plan, device=device).total <= room:
            return text
    if device == "cpu":
        return "a smaller model, shorter rows, or more machines"
    return "more processes, each of which holds less"


def _changes(job: Job, plan: Plan) -> Iterator[tuple[str, Job, Plan]]:
    """Ways to need less, the cheapest first; later ones include what came before."""
    for mode in ("selective", "full"):
        if job.checkpointing == "none" or (job.checkpointing == "selective" and mode == "full"):
            less = job.with_(checkpointing=mode)
            yield f"train.activation_checkpointing: {mode}", less, plan
    small = job.micro_batch_size
    while small > 1:
        small = next(size for size in range(small - 1, 0, -1) if job.micro_batch_size % size == 0)
        yield f"train.micro_batch_size: {small}", job.with_(micro_batch_size=small), plan
    full = job.with_(checkpointing="full", micro_batch_size=1)
    both = "train.activation_checkpointing: full and train.micro_batch_size: 1"
    yield both, full, plan
    layout = plan.layout
    if layout.data > 1:
        shared = replace(plan, layout=replace(layout, data=1, shard=layout.data * layout.shard), zero=3)
        number = shared.layout.shard
        yield f"parallel.shard: {number} with zero: 3, in place of replicas", job, shared
        yield f"parallel.shard: {number} with zero: 3, and {both}", full, shared
        plan = shared
    elif layout.shard > 1 and plan.zero < 3:
        shared = replace(plan, zero=3)
        yield "parallel.zero: 3", job, shared
        plan = shared
    if job.optimizer in ("adamw", "muon", "lion"):
        small_state = full.with_(optimizer="adamw8bit")
        yield f"train.optimizer: adamw8bit, and {both}", small_state, plan
    yield f"parallel.offload: cpu, and {both}", full, replace(plan, offload=True)


def _fits(facts: ModelFacts, job: Job, cluster: Cluster, device: str) -> bool:
    """Whether one row at a time, with everything recomputed, fits in any layout."""
    least = job.with_(micro_batch_size=1, checkpointing="full")
    room = FILLED * cluster.device.memory
    return any(
        takes_rows(least, plan) and memory_of(facts, least, plan, device=device).total <= room
        for offload in (False, True)
        for plan in legal_plans(facts, job, cluster, offload=offload)
    )


def _fix(facts: ModelFacts, job: Job, cluster: Cluster, device: str) -> str:
    if job.optimizer != "adamw8bit" and _fits(facts, job.with_(optimizer="adamw8bit"), cluster, device):
        return "train.optimizer: adamw8bit"
    number = cluster.num_devices
    while number < _MOST_DEVICES:
        number *= 2
        grown = replace(cluster, num_devices=number, per_node=min(number, max(8, cluster.per_node)))
        rows = job.batch_size if job.batch_size % number == 0 else max(job.batch_size, number)
        if _fits(facts, job.with_(batch_size=rows), grown, device):
            batch = "" if rows == job.batch_size else f", with train.batch_size: {rows}"
            return f"{number} devices of this size are enough{batch}"
    length = job.sequence_length
    while length > _SHORTEST:
        length //= 2
        if _fits(facts, job.with_(sequence_length=length), cluster, device):
            return f"data.sequence_length: {length}"
    return "use devices with more memory, or a smaller model: more of these devices are not enough"


def _largest(memory: Memory) -> tuple[str, float]:
    return max(memory.parts().items(), key=lambda part: part[1])
