"""Saving and loading of sharded state, beside the disk's own speed and torch's distributed checkpoints."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from spread.jobs import Shape, group, new_model, new_rows, new_trainer, recipe_of
from torch import Tensor

from hearth.parallel.world import World
from hearth.training.checkpoint import CheckpointSaver, CheckpointStore
from hearth.training.checkpoint.together import ByGroup

_CHUNK = 8 << 20


def write_plainly(path: Path, num_bytes: int, data: bytes) -> None:
    """So many bytes, on the disk when this returns."""
    with path.open("wb") as file:
        for first in range(0, num_bytes, len(data)):
            file.write(data[: num_bytes - first])
        file.flush()
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    """All bytes of a file."""
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(folder: Path) -> None:
    """Take a folder's files out of the system's memory, where it can be asked to."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Clock:
    """Seconds from when all processes are ready until all are done."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, work: Callable[[], object]) -> None:
        dist.barrier()
        started = time.perf_counter()
        work()
        dist.barrier()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)

    def read(self, name: str, folder: Path, work: Callable[[], object]) -> None:
        """The same, with a folder that is not in memory."""
        self._world.on_main(lambda: forget(folder))
        self.time(name, work)


def _tree(trainer: Any) -> dict[str, Tensor]:
    """What Hearth saves, as live tensors by name: DTensors, of which each process has a part."""
    found: dict[str, Tensor] = {}
    for group_, part in trainer.stateful.items():
        if group_ in ("model", "optimizer"):
            found |= {f"{group_}.{name}": tensor for name, tensor in part.state_tensors().items()}
    return found


def checkpoints(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every save and load, in turns; and the bytes of the state."""
    shape, scratch = Shape(**job["shape"]), Path(job["scratch"])
    with group({"shard": 2}) as world:
        recipe = recipe_of(shape, {"shard": 2}, job["precision"])
        trainer = new_trainer(new_model(shape.size), new_rows(shape.length), recipe, world)
        trainer.train_step(0)  # before it the optimizer has no state
        clock = _Clock(world)
        tree = _tree(trainer)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tree.values())
        data = os.urandom(_CHUNK)
        for round_ in range(job["rounds"]):
            folder = scratch / str(round_)
            world.on_main(lambda folder=folder: folder.mkdir())
            _raw(clock, world, folder, num_bytes, data)
            _ours(clock, world, folder, trainer, step=round_ + 1)
            _torch(clock, folder, tree)
            world.on_main(lambda folder=folder: shutil.rmtree(folder))
    return {"seconds": clock.seconds, "bytes": num_bytes}


def _raw(clock: _Clock, world: World, folder: Path, num_bytes: int, data: bytes) -> None:
    one, own = folder / "one", folder / f"part-{world.rank}"
    clock.time("disk, 1 process: save", lambda: world.is_main and write_plainly(one, num_bytes, data))
    clock.time("disk, 2 processes: save", lambda: write_plainly(own, num_bytes // world.size, data))
    clock.read("disk, 1 process: load", folder, lambda: world.is_main and read_plainly(one))
    clock.read("disk, 2 processes: load", folder, lambda: read_plainly(own))


def _ours(clock: _Clock, world: World, folder: Path, trainer: Any, *, step: int) -> None:
    store = CheckpointStore(folder / "hearth", together=ByGroup(world.savers))
    saver = CheckpointSaver(store, background=False)
    trainer.state.step = step
    clock.time("hearth: save", lambda: saver.save(step, trainer.checkpoint_contents))
    path = store.list()[0]
    clock.read("hearth: load", path, lambda: trainer.load_checkpoint(store.load(path)))


def _torch(clock: _Clock, folder: Path, tree: dict[str, Tensor]) -> None:
    path = folder / "dcp"
    clock.time("torch DCP: save", lambda: dcp.save(tree, checkpoint_id=path))
    target = {name: torch.zeros_like(tensor) for name, tensor in tree.items()}
    clock.read("torch DCP: load", path, lambda: dcp.load(target, checkpoint_id=path))
