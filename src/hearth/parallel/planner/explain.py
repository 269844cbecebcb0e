"""Why a layout was chosen, by the rules of the field, with the numbers of the case."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hearth.models.sizes import format_count
from hearth.parallel.planner.collectives import Group
from hearth.parallel.planner.hardware import GIB
from hearth.parallel.planner.memory import state_processes
from hearth.parallel.planner.schedules import bubble_share
from hearth.parallel.planner.state import place

if TYPE_CHECKING:
    from hearth.parallel.planner.choose import Choice, Planning

# Below this many parameters replicas of the whole state are usual; above, a replica is cut.
_DATA_PARALLEL_BELOW = 7_000_000_000


def excess(planning: Planning, choice: Choice) -> float:
    """How many times the state of a replica is larger than the memory of its devices.

    Weights, gradients and optimizer state of a part that tensor and pipeline parallelism have cut off.
    """
    facts, job, layout = planning.facts, choice.job, choice.plan.layout
    state = place(facts, job, range(facts.num_layers), first=True, last=True, tensor=1, expert=1)
    whole = state.whole
    held = whole.weights + whole.gradients + whole.optimizer + whole.average
    return held / (layout.tensor * layout.pipeline) / planning.cluster.device.memory


def zero_rule(times: float) -> str:
    """What the rules of the field advise for a state that is so many times the memory of a device."""
    if times < 1:
        return "it fits, so ZeRO 1 is enough"
    if times < 4:
        return "between 1 and 4 times: ZeRO 2 with activation checkpointing is advised"
    if times < 10:
        return "between 4 and 10 times: ZeRO 3 is advised"
    return "more than 10 times: ZeRO 3 over many devices, more of them, or offload"


def explain(planning: Planning) -> list[str]:
    """Sentences, the most important first."""
    facts, cluster, chosen = planning.facts, planning.cluster, planning.chosen
    layout = chosen.plan.layout
    told = [_about_size(planning)]
    if cluster.num_devices > 1:
        times = excess(planning, chosen)
        told.append(
            f"weights, gradients and optimizer state of one process without ZeRO are {times:.2f} times the "
            f"memory of a device; {zero_rule(times)}"
        )
    told += [
        text for text in (_about_zero(chosen), _about_tensor(planning), _about_pipeline(planning)) if text
    ]
    if layout.expert > 1:
        told.append(
            f"the {facts.num_experts} experts of a layer are spread over {layout.expert} processes, and "
            f"tokens travel to them: {_share(chosen, 'expert')} of the step"
        )
    elif facts.num_experts and cluster.num_devices > 1:
        told.append(
            f"every process uses all {facts.num_experts} experts of a layer: spreading them, with tokens on "
            f"their way, is estimated to be slower or to need more"
        )
    if layout.context > 1:
        told.append(
            f"rows of {chosen.job.sequence_length:,} tokens are cut over {layout.context} processes of a node"
        )
    if chosen.job.checkpointing != planning.job.checkpointing:
        told.append(
            f"activation_checkpointing: {chosen.job.checkpointing} makes room for it; the recipe has "
            f"{planning.job.checkpointing}"
        )
    if chosen.plan.offload:
        told.append("nothing fits without the memory of the host: offload: cpu, which is slow")
    told.append(_about_others(planning))
    return told


def _about_size(planning: Planning) -> str:
    facts, layout = planning.facts, planning.chosen.plan.layout
    size = format_count(facts.num_parameters)
    cut = max(layout.tensor, layout.pipeline) > 1
    if facts.num_parameters < _DATA_PARALLEL_BELOW:
        rule = f"{size} parameters are below 7 B, where data parallelism is the rule"
        return rule if not cut else f"{rule}; a cut model is estimated to be faster or to fit here"
    rule = f"{size} parameters are above 7 B, where a model is cut: by tensors in a node, by layers across"
    return rule if cut else f"{rule}; sharing its state over all processes is estimated to be faster here"


def _about_zero(chosen: Choice) -> str:
    layout, zero = chosen.plan.layout, chosen.plan.zero
    if layout.shard == 1:
        return ""
    what = {
        1: "optimizer state",
        2: "gradients and optimizer state",
        3: "weights, gradients and optimizer state",
    }
    number = state_processes(chosen.job, chosen.plan)
    beside = chosen.memory.activations + chosen.memory.copies + chosen.memory.logits
    return (
        f"ZeRO {zero}: {number} processes share {what[zero]}; beside it activations, half-precision copies "
        f"of weights and logits take {beside / GIB:.1f} GiB"
    )


def _about_tensor(planning: Planning) -> str:
    chosen = planning.chosen
    size = chosen.plan.layout.tensor
    if size == 1:
        return ""
    return (
        f"tensor {size} stays within a node of {planning.cluster.per_node}, over "
        f"{planning.cluster.inside.name}: {_share(chosen, 'tensor')} of the step are its sums"
    )


def _about_pipeline(planning: Planning) -> str:
    chosen, cluster = planning.chosen, planning.cluster
    layout, plan = chosen.plan.layout, chosen.plan
    if layout.pipeline == 1:
        return ""
    number = plan.micro_batches(chosen.job)
    share = bubble_share(
        plan.schedule,  # type: ignore[arg-type]
        stages=layout.pipeline,
        chunks=plan.chunks,
        micro_batches=number,
    )
    where = "across nodes" if Group.of(layout, "pipeline").nodes(cluster) > 1 else "within a node"
    return (
        f"pipeline {layout.pipeline} {where} sends little, and waits for {share:.0%} of its work with "
        f"{number} micro-batches ({plan.schedule})"
    )


def _about_others(planning: Planning) -> str:
    fastest = min(planning.choices, key=lambda choice: choice.step.seconds)
    number = len(planning.choices)
    if fastest is planning.chosen:
        return f"it is the fastest of {number} layouts that fit"
    slower = planning.chosen.step.seconds / fastest.step.seconds - 1
    return (
        f"of {number} layouts that fit the fastest is {slower:.1%} faster and more involved, which is within "
        f"the error of the estimate"
    )


def _share(choice: Choice, part: str) -> str:
    return f"{choice.step.parts()[part] / choice.step.seconds:.0%}"
