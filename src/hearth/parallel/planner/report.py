"""A plan for people and for scripts."""

from __future__ import annotations

from typing import Any

from hearth.config.parallel import ParallelSection
from hearth.parallel.planner.choose import Choice, Planning, describe_size
from hearth.parallel.planner.hardware import GIB
from hearth.parallel.planner.legal import section_of

_HOURS_A_DAY = 24


def parallel_section(choice: Choice) -> dict[str, Any]:
    """What to write into the recipe's section parallel: what is not its default."""
    layout = choice.plan.layout
    section = section_of(choice.plan, bf16_reduce=choice.job.bf16_reduce)
    found = {"data": layout.data} | section.model_dump(exclude_defaults=True)
    if layout.shard > 1:
        found["zero"] = section.zero
    if layout.pipeline > 1:
        found["schedule"] = section.schedule
    order = [name for name in ParallelSection.model_fields if name in found]
    return {name: found[name] for name in order}


def train_section(choice: Choice) -> dict[str, Any]:
    """What of the section train the plan needs as it says."""
    return {
        "micro_batch_size": choice.job.micro_batch_size,
        "activation_checkpointing": choice.job.checkpointing,
    }


def paste(choice: Choice) -> str:
    """The sections of a recipe, in YAML."""
    lines = []
    for name, section in (("parallel", parallel_section(choice)), ("train", train_section(choice))):
        lines.append(f"{name}:")
        lines += [f"  {key}: {str(value).lower()}" for key, value in section.items()]
    return "\n".join(lines)


def cost(planning: Planning, choice: Choice, tokens: float) -> float | None:
    """Price of so many tokens, without failures; None without a price."""
    price = planning.cluster.price
    if price is None:
        return None
    hours = tokens / choice.step.tokens_per_second / 3600
    return hours * price * planning.cluster.num_devices


def as_dict(planning: Planning, *, top: int = 5) -> dict[str, Any]:
    """All figures, for JSON. Bytes, seconds."""
    facts, cluster = planning.facts, planning.cluster
    return {
        "model": {
            "type": facts.model_type,
            "parameters": facts.num_parameters,
            "active_parameters": facts.num_active_parameters,
            "layers": facts.num_layers,
        },
        "cluster": {
            "device": cluster.device.name,
            "devices": cluster.num_devices,
            "per_node": cluster.per_node,
            "memory": cluster.device.memory,
            "inside": cluster.inside.name,
            "between": cluster.between.name,
        },
        "legal": planning.num_legal,
        "fitting": len(planning.choices),
        "chosen": _choice(planning, planning.chosen),
        "best": [_choice(planning, choice) for choice in planning.choices[:top]],
        "reasons": list(planning.reasons),
    }


def _choice(planning: Planning, choice: Choice) -> dict[str, Any]:
    step, price = choice.step, planning.cluster.price
    return {
        "parallel": parallel_section(choice),
        "train": train_section(choice),
        "memory": {"total": round(choice.memory.total)}
        | {name: round(value) for name, value in choice.memory.parts().items()},
        "step_seconds": step.seconds,
        "step_parts": step.parts(),
        "mfu": step.mfu,
        "tokens_per_second": step.tokens_per_second,
        "tokens_per_day": step.tokens_per_day,
        "cost_per_day": None if price is None else price * planning.cluster.num_devices * _HOURS_A_DAY,
        "cost_per_billion_tokens": cost(planning, choice, 1e9),
    }


def layout_row(choice: Choice) -> tuple[str, ...]:
    """A line of the table of layouts; see `LAYOUT_COLUMNS`."""
    layout, plan, job = choice.plan.layout, choice.plan, choice.job
    groups = [
        f"{name} {getattr(layout, name)}"
        for name in ("data", "shard", "tensor", "pipeline", "context", "expert")
        if getattr(layout, name) > 1
    ]
    details = []
    if layout.shard > 1:
        details.append(f"ZeRO {plan.zero}")
    if plan.sequence:
        details.append("sequence")
    if layout.pipeline > 1:
        details.append(plan.schedule)
    if job.checkpointing != "none":
        details.append(f"recompute {job.checkpointing}")
    if plan.offload:
        details.append("offload")
    return (
        " x ".join(groups) or "one process",
        ", ".join(details),
        str(job.micro_batch_size),
        f"{choice.memory.total / GIB:.1f}",
        f"{choice.step.seconds:.3g}",
        f"{choice.step.mfu:.1%}",
        f"{choice.step.tokens_per_day / 1e9:.3g}",
    )


LAYOUT_COLUMNS = ("layout", "with", "micro-batch", "GiB", "step, s", "MFU", "B tokens a day")


def headline(planning: Planning) -> str:
    """What is planned, in a line."""
    cluster, job = planning.cluster, planning.job
    return (
        f"{planning.facts.model_type}, {describe_size(planning.facts)}; {cluster.num_devices} x "
        f"{cluster.device.name} of {cluster.device.memory / GIB:.1f} GiB, {cluster.inside.name} in a node of "
        f"{cluster.per_node}, {cluster.between.name} between; steps of {job.batch_size} rows of "
        f"{job.sequence_length:,} tokens"
    )
