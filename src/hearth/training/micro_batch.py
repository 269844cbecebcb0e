"""How many rows fit into one forward and backward pass, found by trying."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hearth.engine.memory import available_memory
from hearth.errors import ConfigError
from hearth.training import rng
from hearth.training.checkpoint.together import in_all
from hearth.training.clipping import local
from hearth.training.optimizers import state_bytes
from hearth.training.peak_memory import peak_bytes
from hearth.training.totals import add_up

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer

# Part of the free memory that a step may take: allocators do not give everything back, kernels have buffers
# of their own, and other steps have longer rows.
_SHARE = 0.8


@dataclass(frozen=True)
class MicroBatch:
    """The size found, and what it was found from."""

    size: int  # rows
    row_bytes: int  # what another row adds
    fixed_bytes: int  # what a step needs besides its rows: gradients, optimizer state, buffers
    free_bytes: int


def largest_size(batch_size: int, *, row_bytes: int, fixed_bytes: int, free_bytes: int) -> int:
    """The largest divisor of ``batch_size`` that fits; 0 when one row does not."""
    sizes = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    fitting = [size for size in sizes if fixed_bytes + size * row_bytes <= _SHARE * free_bytes]
    return max(fitting, default=0)


def find_size(
    measure: Callable[[int], int | None], *, batch_size: int, reserved_bytes: int, free_bytes: int
) -> MicroBatch:
    """Extrapolate from one and two rows: memory is linear in them.

    ``measure(size)``: bytes at the peak of a forward and backward pass over so many rows, or None where it
    ran out of memory. ``reserved_bytes``: what will be allocated later. Raises ConfigError when one row is
    too many.
    """
    one = measure(1)
    two = measure(2) if batch_size > 1 and one is not None else None
    if one is not None:
        row = one if two is None else max(1, two - one)
        fixed = reserved_bytes + (0 if two is None else max(0, one - row))
        size = largest_size(batch_size, row_bytes=row, fixed_bytes=fixed, free_bytes=free_bytes)
        if two is None:
            size = min(size, 1)  # two rows ran out of memory
        if size:
            return MicroBatch(size, row, fixed, free_bytes)
    needed = "more" if one is None else f"{(one + reserved_bytes) / 2**30:.2f} GiB"
    raise ConfigError(
        f"train.micro_batch_size auto: one row needs {needed}, of {free_bytes / 2**30:.2f} GiB free memory "
        f"{_SHARE:.0%} may be used",
        fix="lower data.sequence_length, or use activation_checkpointing: full or optimizer: adamw8bit",
    )


def choose_micro_batch(trainer: Trainer) -> MicroBatch:
    """Try the first step of a trainer with one and two rows. Nothing of it stays, random state included.

    On a GPU the size found is tried too, and the next smaller one taken while it runs out of memory. Of
    several processes each measures its own share, and all take the smallest size that one of them finds; all
    must ask. There no try may run out of memory: the others would wait for it. Raises ConfigError then.
    """
    world, device = trainer.world, trainer.device
    share = trainer.config.train.batch_size // world.layout.batch_ranks
    before = rng.capture()
    known = trainer.state.micro_batch_size

    def measure(size: int) -> int | None:
        # Gradients stay from pass to pass, as they do between the micro-batches of a step.
        trainer.state.micro_batch_size = size
        rows = trainer.step_rows(0)[: size * world.layout.batch_ranks]
        batches = trainer.objective.batches(trainer, 0, rows)
        expected = world.sum_counts(add_up(trainer.objective.counts(batch) for batch in batches))
        try:
            return peak_bytes(lambda: trainer._accumulate(batches, expected), device)
        except torch.OutOfMemoryError as error:
            if world.size > 1:
                raise _out_of_memory(size) from error
            torch.cuda.empty_cache()
            return None

    try:
        trainer.model.train()
        free = _free_memory(trainer)
        measure(1)  # the first pass makes what stays: gradients, tables, workspaces of libraries
        gradients = sum(local(gradient).nbytes for gradient in trainer.updates.gradients())
        reserved = gradients + state_bytes(trainer.optimizer)
        needed = {1: measure(1)}
        if share > 1 and needed[1] is not None:
            needed[2] = measure(2)
        found = min(
            in_all(
                world,
                lambda: find_size(needed.get, batch_size=share, reserved_bytes=reserved, free_bytes=free),
            ),
            key=lambda each: each.size,
        )
        while device.type == "cuda" and found.size > 1 and measure(found.size) is None:
            smaller = max(size for size in range(1, found.size) if share % size == 0)
            found = MicroBatch(smaller, found.row_bytes, found.fixed_bytes, found.free_bytes)
        return found
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.state.micro_batch_size = known
        rng.restore(*before)


def _free_memory(trainer: Trainer) -> int:
    """Bytes that this process may still take: of its GPU, or its part of what the host has."""
    free = available_memory(trainer.device)
    if trainer.device.type == "cuda":
        return free
    hosts = trainer.world.gather(socket.gethostname())
    return free // hosts.count(socket.gethostname())


def _out_of_memory(size: int) -> ConfigError:
    return ConfigError(
        f"train.micro_batch_size auto: {size} rows of a process ran out of its memory",
        fix="give a number" + (", such as 1" if size > 1 else "; lower data.sequence_length"),
    )
