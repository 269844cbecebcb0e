"""The processes of a job: who they are, and what they tell each other.

A process finds its place in the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT). Without them it is alone, and nothing of torch.distributed is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError, LostProcessError, TrainingError
from hearth.parallel.layout import DIMENSIONS, Layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Item = TypeVar("Item")
# A process that is gone is noticed at once; one that works, however long, is waited for.
_LONG = datetime.timedelta(days=2)
_GRACE_SECONDS = 5.0  # in which torch reports by itself that time is over
_START = "start the processes with `hearth launch` or torchrun"
_REACH = "see that every process runs and reaches that address; parallel.timeout says how long to wait"
_PORT = "give every job of a node a MASTER_PORT of its own, and end what is left of an earlier start"
# Of gloo and NCCL, which raise plain RuntimeErrors, also in a backward pass.
_SIGNS_OF_LOSS = ("gloo", "nccl", "connection closed", "connection reset", "timeout caused pair closure")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among all. ``mesh`` has a dimension for each of `DIMENSIONS`; None for a process alone."""

    layout: Layout
    device: torch.device
    rank: int = 0
    mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None  # the same processes, with those of a group of experts together
    timeout: float = 600.0  # seconds that a step waits for the others
    patient: Any = None  # the group of all that may wait for hours: while one prepares data, say
    savers: Any = None  # the group of all for the threads that write checkpoints

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """One process."""
        return cls(Layout(), device)

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.layout.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is the process that records and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of the rows of a step, of equal size for all."""
        each, rest = divmod(len(items), self.layout.batch_ranks)
        assert rest == 0, "the batch size was checked to divide"
        first = self.layout.batch_rank(self.rank) * each
        return items[first : first + each]

    def sum_over_batch(self, tensor: Tensor) -> Tensor:
        """Add up, in place, over the processes that train on different rows, or positions, of a step."""
        if self.mesh is not None:
            for name in ("data", "shard", "context"):
                if getattr(self.layout, name) > 1:
                    dist.all_reduce(tensor, group=self.mesh.get_group(name))
        return tensor

    def replica_group(self) -> Any:
        """The processes whose gradients add up where weights are not sharded."""
        assert self.mesh is not None
        if self.layout.context == 1:
            return self.mesh.get_group("data")
        if self.layout.data == 1:
            return self.mesh.get_group("context")
        return self._flattened("data", "shard", "context", name="replicas").get_group()

    def sharding_mesh(self) -> DeviceMesh:
        """Over which weights are sharded; with a first dimension over which they are replicated, if any.

        Processes of ``context`` share weights as those of ``shard`` do: they have the same ones.
        """
        assert self.mesh is not None
        if self.layout.context == 1:
            return self.mesh["data", "shard"] if self.layout.data > 1 else self.mesh["shard"]
        both = self._flattened("shard", "context", name="shard_context")
        return self.mesh["data", "shard_context"] if self.layout.data > 1 else both

    def _flattened(self, *dimensions: str, name: str) -> DeviceMesh:
        assert self.mesh is not None
        found = self.mesh[dimensions]._flatten(name)
        _limit_patience([found], self.timeout)
        return found

    def whole_norm(self, norm: Tensor) -> Tensor:
        """The norm over all stages of a pipeline, from that of the stages of this process."""
        if self.layout.pipeline == 1:
            return norm
        assert self.mesh is not None
        square = norm.double().square()
        dist.all_reduce(square, group=self.mesh.get_group("pipeline"))
        return square.sqrt()

    def on_main(self, function: Callable[[], Item]) -> Item:
        """What ``function`` returns in the main process, in all; raises in all where it raised."""
        if self.size == 1:
            return function()
        result: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                result = function()
            except Exception as raised:  # noqa: BLE001 - told to all, and raised again
                error = raised
        result, error = self.from_main((result, error))
        if error is not None:
            raise error
        found: Item = result
        return found

    def main_first(self, function: Callable[[], Item]) -> Item:
        """``function`` in every process, in the main one before the others: what it makes, they find."""
        made: list[Item] = []
        self.on_main(lambda: made.append(function()))
        return made[0] if made else function()

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Counts by name, added up over the processes with different rows; all have the same names."""
        if self.size == 1 or not counts:
            return dict(counts)
        names = sorted(counts)
        values = torch.tensor(
            [float(counts[name]) for name in names], dtype=torch.float64, device=self.device
        )
        return dict(zip(names, self.sum_over_batch(values).tolist(), strict=True))

    def from_main(self, value: Item) -> Item:
        """What the main process has, in all processes; any picklable value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def gather(self, value: Item) -> list[Item]:
        """The values of all processes, by rank, in all of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.patient)
        return found

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Raise ConfigError, in every process, where processes were started with different things."""
        everywhere = self.gather(dict(facts))
        for name, value in everywhere[0].items():
            others = {
                rank: found.get(name) for rank, found in enumerate(everywhere) if found.get(name) != value
            }
            if others:
                rank, other = next(iter(others.items()))
                raise ConfigError(
                    f"the processes differ in {name}: rank 0 has {value}, rank {rank} has {other}"
                    + (f", and {len(others) - 1} more differ" if len(others) > 1 else ""),
                    fix="start all processes from the same code, with the same recipe and overrides",
                )

    @contextlib.contextmanager
    def missed(self, during: Callable[[], str], *, fix: str | None = None) -> Iterator[None]:
        """Within, a process that is gone or silent is a LostProcessError that says ``during`` what."""
        try:
            yield
        except RuntimeError as error:
            if not _is_loss(error):
                raise
            raise LostProcessError(
                f"rank {self.rank} of {self.size} lost a process in {during()}: {_first_line(error)}",
                fix=fix or "look at what the process that ended first says; those that waited end like this",
            ) from error


def _is_loss(error: BaseException) -> bool:
    """Whether this is how torch.distributed says that another process is gone or silent."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS_OF_LOSS)


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Without the line of its source, and guesses.
    return text.split("] ", 1)[-1].split(". This is typically", 1)[0]


def is_launched() -> bool:
    """Whether this process was started as one of several."""
    return _number("WORLD_SIZE", 1) > 1


@contextlib.contextmanager
def joined(section: ParallelSection, device: torch.device) -> Iterator[World]:
    """Join the processes that were started together, and leave them at the end.

    Raises ConfigError when the layout does not fit their number or torchrun's variables are incomplete, and
    TrainingError when the others do not come within ``section.timeout`` seconds. One that is lost on the way
    is a LostProcessError; then the groups are left as they are, and all that this process can do is end.
    """
    if not is_launched():
        layout = Layout.of(section, 1)
        yield World(layout, device)
        return
    rank, size = _place()
    layout = Layout.of(section, size)
    device = _own_device(device)
    _connect(section, device, rank, size)
    world = World(layout, device, rank, timeout=section.timeout)
    try:
        with world.missed(lambda: "making groups of processes", fix=_REACH):
            patient, savers = (dist.new_group(backend="gloo", timeout=_LONG) for _ in range(2))
            meshes = _mesh(device, layout), _expert_mesh(device, layout)
            _limit_patience([mesh for mesh in meshes if mesh is not None], section.timeout)
        world = dataclasses.replace(
            world, mesh=meshes[0], expert_mesh=meshes[1], patient=patient, savers=savers
        )
        with world.missed(lambda: "preparing or ending the run"):
            yield world
    except LostProcessError:
        raise  # the groups still wait for what is lost, and would wait in their destructors
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _place() -> tuple[int, int]:
    """(rank, number of processes) by torchrun's variables."""
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set", fix=_START
        )
    rank, size, _ = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT", largest=65535)
    if rank >= size:
        raise ConfigError(f"RANK {rank} is not below WORLD_SIZE {size}: ranks count from 0", fix=_START)
    return rank, size


def _number(name: str, default: int | None = None, *, largest: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal() or (largest is not None and int(text) > largest):
        raise ConfigError(f"the environment variable {name} is {text!r}, no number of its kind", fix=_START)
    return int(text)


def _own_device(device: torch.device) -> torch.device:
    """The GPU of this process, by its number on this node."""
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


def _limit_patience(meshes: Sequence[DeviceMesh], seconds: float) -> None:
    """Let the groups of meshes wait for as long as the recipe says; torch makes them with its own limit."""
    limit = datetime.timedelta(seconds=seconds)
    for mesh in meshes:
        for group in mesh.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(limit, group)


def _connect(section: ParallelSection, device: torch.device, rank: int, size: int) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = datetime.timedelta(seconds=section.timeout)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    unmet = f"rank {rank} of {size} did not meet the others at {where} within {section.timeout:g} s"
    try:
        store = _within(section.timeout + _GRACE_SECONDS, lambda: _meet(limit))
        if store is None:
            raise LostProcessError(f"{unmet}: something else listens there, and does not answer", fix=_REACH)
        _take_place(store, rank, size, where)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"{unmet}: {_first_line(error)}", fix=_REACH) from error


def _meet(limit: datetime.timedelta) -> Any:
    """The store of all processes, found by torchrun's variables."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=limit)))
    store.set_timeout(limit)
    # torchrun starts processes again with the store of those that died, whose addresses are in it.
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if shares_store else "0"
    return dist.PrefixStore(f"hearth/start-{start}", store)  # type: ignore[attr-defined]


def _take_place(store: Any, rank: int, size: int, where: str) -> None:
    """Raise TrainingError where the processes that meet there are those of another job.

    torch would let this one in: it would take the other job's addresses, and wait for its answers for ever.
    """
    there = store.compare_set("size", "", str(size)).decode()
    if there != str(size):
        raise TrainingError(f"another job, of {there} processes, meets at {where}, not {size}", fix=_PORT)
    if store.add(f"rank-{rank}", 1) > 1:
        raise TrainingError(f"another process that meets at {where} is rank {rank} already", fix=_PORT)


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


def _mesh(device: torch.device, layout: Layout) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, layout.sizes, mesh_dim_names=DIMENSIONS)


def _expert_mesh(device: torch.device, layout: Layout) -> DeviceMesh | None:
    from torch.distributed.device_mesh import init_device_mesh

    if layout.expert == 1:
        return None
    sizes = (
        layout.pipeline,
        layout.batch_ranks // layout.expert,
        layout.expert,
        layout.context,
        layout.tensor,
    )
    names = ("pipeline", "replica", "expert", "context", "tensor")
    return init_device_mesh(device.type, sizes, mesh_dim_names=names)
