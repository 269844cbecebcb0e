"""How the processes of a job meet, and part.

A process finds its place in the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT), and the others at the address that they name.
"""

from __future__ import annotations

import datetime
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError, LostProcessError, TrainingError

Item = TypeVar("Item")
REACH = "see that every process runs and reaches that address; parallel.timeout says how long to wait"
_START = "start the processes with `hearth launch` or torchrun"
_PORT = "give every job of a node a MASTER_PORT of its own, and end what is left of an earlier start"
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_GRACE_SECONDS = 5.0  # in which torch reports by itself that time is over
_WORKERS = "(pt_gloo_runloop)"  # what gloo's threads are called, as /proc writes it
_LOOK_SECONDS = 0.01
_NUM_LOOKS = 500
_meetings = itertools.count()  # of this process, which is in as many as the others


def is_launched() -> bool:
    """Whether this process was started as one of several."""
    return _number("WORLD_SIZE", 1) > 1


def place() -> tuple[int, int]:
    """(rank, number of processes). Raises ConfigError for variables that are missing or cannot be."""
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set", fix=_START
        )
    rank, size, _ = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT", largest=65535)
    if rank >= size:
        raise ConfigError(f"RANK {rank} is not below WORLD_SIZE {size}: ranks count from 0", fix=_START)
    _check_restarts()
    return rank, size


def _number(name: str, default: int | None = None, *, largest: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal() or (largest is not None and int(text) > largest):
        raise ConfigError(f"the environment variable {name} is {text!r}, no number of its kind", fix=_START)
    return int(text)


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, by its number on this node. Raises ConfigError where there are too few."""
    if device.type != "cuda":
        return device
    local, there = _number("LOCAL_RANK"), torch.cuda.device_count()
    if local >= there:
        raise ConfigError(
            f"LOCAL_RANK is {local}, but there are {there} GPUs: every process of a node takes its own",
            fix=f"start at most {there} processes on this node",
        )
    own = torch.device("cuda", local)
    torch.cuda.set_device(own)
    return own


def connect(section: ParallelSection, device: torch.device, rank: int, size: int) -> None:
    """Make the group of all processes.

    Raises TrainingError when the others do not come within ``section.timeout`` seconds, or those that meet
    there are another job's.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=section.timeout)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    unmet = f"rank {rank} of {size} did not meet the others at {where} within {section.timeout:g} s"
    try:
        store = _within(section.timeout + _GRACE_SECONDS, lambda: _meet(limit))
        if store is None:
            raise LostProcessError(f"{unmet}: something else listens there, and does not answer", fix=REACH)
        _take_place(store, rank, size, where)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"{unmet}: {first_line(error)}", fix=REACH) from error


def _meet(limit: datetime.timedelta) -> Any:
    """The store of all processes, found by torchrun's variables."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=limit)))
    store.set_timeout(limit)
    # A store outlives meetings, whose addresses stay in it; torchrun's own outlives processes.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _has_store_of_torchrun() else "0"
    own = f"hearth/start-{start}/meeting-{next(_meetings)}"
    return dist.PrefixStore(own, store)  # type: ignore[attr-defined]


def _has_store_of_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _check_restarts() -> None:
    """Raise ConfigError where torchrun would start processes again that could not find each other."""
    nodes, restarts = _number("GROUP_WORLD_SIZE", 1), _number("TORCHELASTIC_MAX_RESTARTS", 0)
    if _has_store_of_torchrun() and nodes > 1 and restarts > 0:
        raise ConfigError(
            f"torchrun is to restart processes on {nodes} nodes with one store for all starts, of which each "
            "node has a count of its own: they would not find each other again",
            fix="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node, with --rdzv-backend=c10d; or use "
            "--max-restarts=0, or hearth launch",
        )


def _take_place(store: Any, rank: int, size: int, where: str) -> None:
    """Raise TrainingError where the processes that meet there are those of another job.

    torch would let this one in: it would take the other job's addresses, and wait for its answers for ever.
    """
    there = store.compare_set("size", "", str(size)).decode()
    if there != str(size):
        raise TrainingError(f"another job, of {there} processes, meets at {where}, not {size}", fix=_PORT)
    if store.add(f"rank-{rank}", 1) > 1:
        raise TrainingError(f"another process that meets at {where} is rank {rank} already", fix=_PORT)


def leave() -> None:
    """Leave all groups, once nothing is under way in them.

    gloo's threads drop the tensors of what they did last after the others have gone on with them. One that
    wants the interpreter for it when the interpreter is ending aborts the process (pytorch issue 190489),
    and a job that is done looks failed. The groups' destructors would wait for their threads, but whatever
    keeps a group, such as torch's own tables of meshes, keeps them from running.
    """
    dist.destroy_process_group()
    num_resting = 0
    for _ in range(_NUM_LOOKS):
        time.sleep(_LOOK_SECONDS)  # who waits for the interpreter gets it now
        # Twice: at the first look, one may have just begun to wait for it.
        num_resting = num_resting + 1 if _workers_rest() else 0
        if num_resting == 2:
            break


def _workers_rest() -> bool:
    """Whether all of gloo's threads wait for something. True where the system does not tell."""
    for file in Path("/proc/self/task").glob("*/stat"):
        try:
            _, name, state = file.read_text().split(maxsplit=3)[:3]
        except OSError:
            continue  # it has ended
        if name == _WORKERS and state != "S":
            return False
    return True


def _within(seconds: float, function: Callable[[], Item]) -> Item | None:
    """What ``function`` returns; None where it has not after so many seconds, and may never.

    torch greets whatever listens at the address, and waits for its answer without any limit.
    """
    found: list[Item] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            found.append(function())
        except Exception as error:  # noqa: BLE001 - raised again, where it is waited for
            raised.append(error)

    thread = threading.Thread(target=run, name="hearth-meeting", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    return found[0] if found else None


def first_line(error: BaseException) -> str:
    """What torch says, without the line of its source, and guesses."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.split("] ", 1)[-1].split(". This is typically", 1)[0]
