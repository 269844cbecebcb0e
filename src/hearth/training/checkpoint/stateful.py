"""Who has state that a run needs to continue: the model, the optimizers, random states, an average of the
weights, a loss scaler, whatever an objective keeps. Each is one group of a checkpoint.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from hearth.errors import ConfigError
from hearth.parallel.shards import part_to_write, shape_of
from hearth.parallel.world import World
from hearth.training.checkpoint.sharded import Place

if TYPE_CHECKING:
    from hearth.training.checkpoint.store import Checkpoint

RANDOM = "rng"  # the part that holds the random states
_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")


@runtime_checkable
class HasTensors(Protocol):
    """Something with tensors that a checkpoint holds."""

    def state_tensors(self) -> Mapping[str, Tensor]:
        """Tensors by name. They may be live: the saver copies them before the next step changes them."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor], /) -> None:
        """Take over the tensors of a checkpoint, which are on the host."""


@runtime_checkable
class HasValues(Protocol):
    """Something with JSON values that a checkpoint holds."""

    def state_values(self) -> Mapping[str, Any]:
        """Finite numbers, strings, lists, dictionaries with string keys, None; by name."""

    def load_state_values(self, values: Mapping[str, Any], /) -> None:
        """Take over the values of a checkpoint; called before ``load_state_tensors``."""


# What ``state_*`` returns must, given to ``load_state_*`` of a fresh object, make that one behave bit for bit
# as this one. Names of tensors and values must not depend on the number of processes.
Stateful = HasTensors | HasValues


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint: groups of tensors, and JSON values by group.

    ``places``: of tensors that are a part of a larger one, its shape and where in it they begin.
    """

    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]
    places: dict[str, dict[str, Place]] = field(default_factory=dict)

    def own_part(self, world: World) -> Contents:
        """What this process writes of it, where tensors are spread over processes; all must ask."""
        if world.size == 1:
            return self
        tensors: dict[str, dict[str, Tensor]] = {}
        places: dict[str, dict[str, Place]] = {}
        for group, found in self.tensors.items():
            if group == RANDOM:  # every process has its own
                tensors[group] = found
                continue
            written = {name: part_to_write(tensor, world) for name, tensor in found.items()}
            parts = {name: part for name, part in written.items() if part is not None}
            tensors[group] = {name: part.local for name, part in parts.items()}
            places[group] = {n: (p.shape, p.offset) for n, p in parts.items() if not p.is_whole}
        return Contents(tensors, self.values, places)


class _Selected(Mapping[str, Tensor]):
    """Some of the tensors of a group; each is read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: list[str]) -> None:
        self._tensors, self._names = tensors, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name."""
        return {name: shape_of(self._tensors, name) for name in self._names}

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """A part of a tensor."""
        read = getattr(self._tensors, "read", None)
        found: Tensor = self._tensors[name][box] if read is None else read(name, box)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def collect(parts: Mapping[str, Stateful]) -> Contents:
    """The state of all parts, as it is now."""
    for name in parts:
        assert _GROUP_NAME.fullmatch(name), f"{name!r} cannot name a file of a checkpoint"
    return Contents(
        tensors={n: dict(p.state_tensors()) for n, p in parts.items() if isinstance(p, HasTensors)},
        values={n: dict(p.state_values()) if isinstance(p, HasValues) else {} for n, p in parts.items()},
    )


def restore(
    parts: Mapping[str, Stateful], checkpoint: Checkpoint, *, absent_weights: Container[str] = ()
) -> None:
    """Put every part back to where the checkpoint found it, but for what is of ``absent_weights``.

    Raises ConfigError, before anything changes, when the checkpoint has other parts than this run.
    """
    saved = checkpoint.state["parts"]
    absent, unknown = sorted(set(parts) - set(saved)), sorted(set(saved) - set(parts))
    if absent or unknown:
        says = [f"has no state of {name}" for name in absent]
        says += [f"has state of {name}, which this run does not use" for name in unknown]
        raise ConfigError(
            f"checkpoint {checkpoint.path} cannot be resumed: it {', '.join(says)}",
            fix="keep the settings of the run, or start a new run from its model",
        )
    # Random states last: whatever the others draw while they load must not count.
    for name, part in sorted(parts.items(), key=lambda item: item[0] == RANDOM):
        if isinstance(part, HasValues):
            part.load_state_values(saved[name])
        if isinstance(part, HasTensors):
            tensors = checkpoint.tensors[name]
            own = [key for key in tensors if key.partition("|")[0] not in absent_weights]
            part.load_state_tensors(_Selected(tensors, own))
