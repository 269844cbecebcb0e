"""The processes of a job: who they are, and what they tell each other.

A process without torchrun's variables is alone, and nothing of torch.distributed is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hearth.config.parallel import ParallelSection
from hearth.errors import ConfigError, LostProcessError
from hearth.parallel.layout import DIMENSIONS, Layout
from hearth.parallel.meeting import REACH, connect, first_line, is_launched, leave, own_device, place

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Item = TypeVar("Item")
# A process that is gone is noticed at once; one that works, however long, is waited for.
_LONG = datetime.timedelta(days=2)
# Of gloo and NCCL, which raise plain RuntimeErrors, also in a backward pass.
_SIGNS_OF_LOSS = ("gloo", "nccl", "connection closed", "connection reset", "timeout caused pair closure")


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
                f"rank {self.rank} of {self.size} lost a process in {during()}: {first_line(error)}",
                fix=fix or "look at what the process that ended first says; those that waited end like this",
            ) from error


def _is_loss(error: BaseException) -> bool:
    """Whether this is how torch.distributed says that another process is gone or silent."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS_OF_LOSS)


@contextlib.contextmanager
def joined(section: ParallelSection, device: torch.device) -> Iterator[World]:
    """Join the processes that were started together, and leave them at the end.

    Raises ConfigError when the layout does not fit their number, and what `place` and `connect` raise. One
    that is lost on the way is a LostProcessError; then the groups are left as they are, and all that this
    process can do is end.
    """
    if not is_launched():
        layout = Layout.of(section, 1)
        yield World(layout, device)
        return
    rank, size = place()
    layout = Layout.of(section, size)
    device = own_device(device)
    connect(section, device, rank, size)
    world = World(layout, device, rank, timeout=section.timeout)
    try:
        with world.missed(lambda: "making groups of processes", fix=REACH):
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
        leave()
        raise
    leave()


def _limit_patience(meshes: Sequence[DeviceMesh], seconds: float) -> None:
    """Let the groups of meshes wait for as long as the recipe says; torch makes them with its own limit."""
    limit = datetime.timedelta(seconds=seconds)
    for mesh in meshes:
        for group in mesh.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(limit, group)


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
