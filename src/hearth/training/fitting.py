"""Whether a run fits into the memory of its processes: known before anything is prepared or built."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import torch

from hearth.errors import ConfigError, HearthError
from hearth.parallel.planner import (
    ModelFacts,
    Plan,
    check_fits,
    facts_of_config,
    facts_of_recipe,
    job_of_recipe,
    memory_of,
)
from hearth.parallel.planner.hardware import GIB
from hearth.telemetry.hardware import whole_host_memory
from hearth.training.loss import unwrap
from hearth.training.optimizers import state_bytes
from hearth.training.plan import estimate_memory
from hearth.training.precision import choose_precision
from hearth.training.progress import TrainingProgress

if TYPE_CHECKING:
    from hearth.config import Recipe
    from hearth.parallel.planner.job import Precision
    from hearth.parallel.world import World
    from hearth.training.trainer import Trainer
    from hearth.workspace import Workspace

# A tokenizer that is trained with the run may come out smaller than asked for.
_FEW_WORDS = 512


def memory_of_device(device: torch.device) -> int:
    """Bytes that one process may have: of its GPU, or an equal share of this machine's memory and swap."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return whole_host_memory() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def refuse_what_cannot_fit(recipe: Recipe, world: World, *, workspace: Workspace | None) -> None:
    """Raise ConfigError, in every process, where a process has less memory than the run needs.

    Refused is what no error of the estimate explains; what is only likely not to fit is warned of. Says
    nothing of models that it cannot count: what is wrong with them is said when they are built.
    """
    memory = memory_of_device(world.device)
    found: str | ConfigError | None = None
    try:
        found = _verdict(recipe, world, workspace, memory)
    except ConfigError as error:
        found = error
    for rank, verdict in enumerate(world.gather(found)):
        if isinstance(verdict, ConfigError):
            raise verdict
        if verdict is not None and world.is_main:
            text = verdict if world.size == 1 else f"rank {rank}: {verdict}"
            TrainingProgress(first_step=0, total_steps=0, enabled=False).warn(text)
            return


def _verdict(recipe: Recipe, world: World, workspace: Workspace | None, memory: int) -> str | None:
    device = world.device.type
    precision = choose_precision(recipe.train.precision, world.device)
    try:
        facts = facts_of_recipe(recipe, workspace)
    except HearthError:
        return None
    job = job_of_recipe(recipe, precision=cast("Precision", precision), device=device)
    plan = Plan.of(recipe.parallel, world.size)
    needed = memory_of(facts, job, plan, device=device).total
    if needed <= memory:
        return None
    if not _counts_too_much(recipe):
        misfits = []
        for model in _possible_models(recipe, facts, workspace):
            try:
                check_fits(model, job, plan, memory_bytes=memory, device=device, certain=True)
            except ConfigError as error:
                misfits.append(error)
            else:
                break
        else:
            raise misfits[0]
    return (
        f"this run may not fit: a process needs about {needed / GIB:.1f} GiB and may have "
        f"{memory / GIB:.1f} GiB; `hearth plan` says what needs less"
    )


def _possible_models(recipe: Recipe, facts: ModelFacts, workspace: Workspace | None) -> list[ModelFacts]:
    """The model with the vocabulary that is asked for, and with a small one where it is yet to be made."""
    if recipe.model.base is not None or recipe.tokenizer.base is not None:
        return [facts]
    tokenizer = recipe.tokenizer.model_copy(update={"vocab_size": _FEW_WORDS})
    smaller = recipe.model_copy(update={"tokenizer": tokenizer})
    try:
        return [facts, facts_of_recipe(smaller, workspace)]
    except HearthError:
        return [facts]


def _counts_too_much(recipe: Recipe) -> bool:
    """Whether the planner counts what this run has not: an output layer, gradients of frozen weights."""
    return recipe.train.objective == "reward" or any(group.freeze for group in recipe.train.parameter_groups)


def memory_of_process(trainer: Trainer, sequence_length: int) -> int:
    """Bytes at the peak of a step of the fullest process.

    One process counts the weights that it has; of several each has its own, and the planner counts.
    """
    recipe, world = trainer.config, trainer.world
    if world.size == 1:
        return estimate_memory(
            trainer.model,
            micro_batch_size=trainer.micro_batch_size,
            sequence_length=sequence_length,
            precision=trainer.precision,
            optimizer_bytes=state_bytes(trainer.optimizer),
            checkpointing=recipe.train.activation_checkpointing,
            averaged=trainer.updates.average is not None,
        )
    device = world.device.type
    job = job_of_recipe(recipe, precision=cast("Precision", trainer.precision), device=device)
    job = job.with_(micro_batch_size=trainer.micro_batch_size, sequence_length=sequence_length)
    facts = facts_of_config(unwrap(trainer.model).config)
    return round(memory_of(facts, job, Plan.of(recipe.parallel, world.size), device=device).total)
