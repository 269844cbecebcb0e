"""Who has state that a run needs to continue: the model, the optimizers, random states, an average of the
weights, a loss scaler, whatever an objective keeps. Each is one group of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from hearth.errors import ConfigError

if TYPE_CHECKING:
    from hearth.training.checkpoint.store import Checkpoint

RANDOM = "rng"  # the part that holds the random states
_GROUP_NAME = re.compile(r"[a-z][a-z0-9_]*")


@runtime_checkable
class HasTensors(Protocol):
    """Something with tensors that a checkpoint holds."""

    def state_tensors(self) -> Mapping[str, Tensor]:
        """Tensors by name. They may be live: the saver copies them before the next step changes them."""

    def load_state_tensors(self, tensors: dict[str, Tensor], /) -> None:
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
    """What goes into a checkpoint: groups of tensors, and JSON values by group."""

    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


def collect(parts: Mapping[str, Stateful]) -> Contents:
    """The state of all parts, as it is now."""
    for name in parts:
        assert _GROUP_NAME.fullmatch(name), f"{name!r} cannot name a file of a checkpoint"
    return Contents(
        tensors={n: dict(p.state_tensors()) for n, p in parts.items() if isinstance(p, HasTensors)},
        values={n: dict(p.state_values()) if isinstance(p, HasValues) else {} for n, p in parts.items()},
    )


def restore(parts: Mapping[str, Stateful], checkpoint: Checkpoint) -> None:
    """Put every part back to where the checkpoint found it.

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
            part.load_state_tensors(checkpoint.tensors[name])
