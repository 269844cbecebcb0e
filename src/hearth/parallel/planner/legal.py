"""Which plans a run is not refused for: the same checks that `hearth train` makes, asked before."""

from __future__ import annotations

import functools

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError
from hearth.parallel.checks import check_micro_batches, check_model, check_settings, check_training
from hearth.parallel.layout import Layout
from hearth.parallel.planner.facts import ModelFacts
from hearth.parallel.planner.job import Job
from hearth.parallel.planner.memory import Plan


@functools.lru_cache(maxsize=4096)
def section_of(plan: Plan, *, bf16_reduce: bool = False) -> ParallelSection:
    """The section of a recipe that asks for a plan. Raises ValueError for what no section may say."""
    layout = plan.layout
    travels = layout.data * layout.shard * layout.context > 1
    return ParallelSection.model_validate(
        {
            "data": layout.data,
            "shard": layout.shard,
            "zero": plan.zero if layout.shard > 1 else 3,
            "tensor": layout.tensor,
            "sequence": plan.sequence,
            "pipeline": layout.pipeline,
            "schedule": plan.schedule,
            "stages": plan.chunks,
            "context": layout.context,
            "expert": layout.expert,
            "offload": "cpu" if plan.offload else "none",
            "reduce": "bf16" if bf16_reduce and travels else "fp32",
        }
    )


def check_section(facts: ModelFacts, job: Job, section: ParallelSection, layout: Layout) -> None:
    """Raise ConfigError for what `hearth train` refuses; micro-batches are `takes_rows`'s."""
    for name in sorted(job.whole):
        if getattr(layout, name) > 1:
            raise ConfigError(f"parallel.{name} {getattr(layout, name)}: the objective does not spread so")
    if layout.tensor not in facts.tensor_sizes:
        raise ConfigError(f"parallel.tensor {layout.tensor}: the {facts.model_type} model is not cut so")
    if job.adapter is not None and max(layout.tensor, layout.pipeline) > 1:
        raise ConfigError("parallel.tensor and parallel.pipeline do not cut adapters")
    if section.sequence and job.sequence_length // layout.context % layout.tensor:
        raise ConfigError(
            f"parallel.sequence: {job.sequence_length // layout.context} positions of a process are no "
            f"multiple of tensor {layout.tensor}"
        )
    check_settings(section, layout)
    check_training(section, layout, optimizer=job.optimizer, compiled=job.compiled)
    check_model(section, facts.config, sequence_length=job.sequence_length)


def is_legal(facts: ModelFacts, job: Job, plan: Plan) -> bool:
    """Whether a run with this plan would be built."""
    try:
        check_section(facts, job, section_of(plan, bf16_reduce=job.bf16_reduce), plan.layout)
    except ConfigError:
        return False
    return True


def takes_rows(job: Job, plan: Plan) -> bool:
    """Whether the rows of a step can be dealt out, and fill the schedule of a pipeline."""
    number = plan.micro_batches(job)
    if number == 0:
        return False
    try:
        check_micro_batches(section_of(plan, bf16_reduce=job.bf16_reduce), number)
    except ConfigError:
        return False
    return True
