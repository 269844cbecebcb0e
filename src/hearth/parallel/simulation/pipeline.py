"""A pipeline step by events: every pass starts when its process is free and its input is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass of a micro-batch through a stage."""

    forward: bool
    micro_batch: int
    stage: int  # of all pieces of the model, in order


def order_1f1b(rank: int, stages: int, micro_batches: int) -> list[Pass]:
    """Passes of a process in 1F1B: warm up, one forward and one backward in turns, cool down.

    Narayanan et al. 2019, "PipeDream", section 3.2, with the flush of Narayanan et al. 2021, section 2.2.1.
    """
    warm_up = min(stages - rank - 1, micro_batches)
    order = [Pass(True, index, rank) for index in range(warm_up)]
    for index in range(micro_batches - warm_up):
        order += [Pass(True, warm_up + index, rank), Pass(False, index, rank)]
    return order + [Pass(False, index, rank) for index in range(micro_batches - warm_up, micro_batches)]


def order_interleaved(rank: int, stages: int, chunks: int, micro_batches: int) -> list[Pass]:
    """Passes of a process with several pieces, in rounds of as many micro-batches as there are processes.

    Narayanan et al. 2021, section 2.2.2; the order of Megatron-LM and torch. Needs a number of micro-batches
    that the number of processes divides.
    """
    assert micro_batches % stages == 0, "rounds must be full"
    total = micro_batches * chunks

    def piece(number: int, forward: bool) -> Pass:
        """The pass of a running number: chunks change with every round of micro-batches."""
        in_group = number % (stages * chunks)
        chunk = in_group // stages
        chunk = chunk if forward else chunks - 1 - chunk
        micro_batch = number // (stages * chunks) * stages + in_group % stages
        return Pass(forward, micro_batch, chunk * stages + rank)

    warm_up = min(2 * (stages - rank - 1) + (chunks - 1) * stages, total)
    order = [piece(number, True) for number in range(warm_up)]
    for index in range(total - warm_up):
        order += [piece(warm_up + index, True), piece(index, False)]
    return order + [piece(index, False) for index in range(total - warm_up, total)]


def run_orders(
    orders: Sequence[Sequence[Pass]],
    *,
    forward: float | Sequence[float],
    backward: float | Sequence[float],
    send: float = 0.0,
) -> float:
    """Seconds until the last process is done. Times of a pass: for all stages, or one for each piece.

    A forward pass needs the one of the stage before, a backward pass that of the stage behind and its own
    forward pass. ``send``: from one process to the next; a process does not wait for what it sends.
    """
    num_pieces = 1 + max(step.stage for order in orders for step in order)
    ahead = [forward] * num_pieces if isinstance(forward, int | float) else list(forward)
    back = [backward] * num_pieces if isinstance(backward, int | float) else list(backward)
    done: dict[Pass, float] = {}
    free, at = [0.0] * len(orders), [0] * len(orders)
    left = sum(map(len, orders))
    while left:
        before = left
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                step = order[at[rank]]
                ready = _ready(step, done, num_pieces, send)
                if ready is None:
                    break
                took = (ahead if step.forward else back)[step.stage]
                free[rank] = done[step] = max(free[rank], ready) + took
                at[rank] += 1
                left -= 1
        assert left < before, "the orders wait for one another"
    return max(free)


def _ready(step: Pass, done: dict[Pass, float], num_pieces: int, send: float) -> float | None:
    """When the input of a pass is there; None where it is not computed yet."""
    if step.forward:
        if step.stage == 0:
            return 0.0
        arrived = done.get(Pass(True, step.micro_batch, step.stage - 1))
        return None if arrived is None else arrived + send
    own = done.get(Pass(True, step.micro_batch, step.stage))
    if own is None or step.stage == num_pieces - 1:
        return own
    arrived = done.get(Pass(False, step.micro_batch, step.stage + 1))
    return None if arrived is None else max(own, arrived + send)
