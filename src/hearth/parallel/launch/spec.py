"""What is to be launched, and what a backend makes of it. Pure data."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from hearth.errors import ConfigError

State = Literal["pending", "running", "finished", "failed", "interrupted", "cancelled", "unknown"]
ENDED: frozenset[State] = frozenset({"finished", "failed", "interrupted", "cancelled"})

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])i?B?", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
# What launchers themselves say to processes.
_RESERVED = frozenset(
    (
        *("HEARTH_HOME", "HEARTH_JOB_DIR", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"),
        *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    )
)


@dataclass(frozen=True)
class Resources:
    """What each node gives a job; ``memory`` in MiB, None leaves it to the cluster."""

    gpus: int = 0
    cpus: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class JobSpec:
    """A job: a recipe, over ``nodes`` times ``processes`` processes. ``time_limit`` is in seconds.

    ``name`` is the job's id, which is also what clusters call it; ``workspace`` is a folder that all
    nodes see.
    """

    name: str
    recipe: str | None
    workspace: str
    overrides: tuple[str, ...] = ()
    resume: str | None = None
    nodes: int = 1
    processes: int = 1
    environment: tuple[tuple[str, str], ...] = ()
    image: str | None = None
    resources: Resources = Resources()
    time_limit: int | None = None
    requeue: bool = True
    max_restarts: int = 3
    join_timeout: int = 600
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.recipe is None and self.resume is None:
            raise ConfigError(
                "no recipe given", fix="hearth launch RECIPE --on …, or hearth launch --resume RUN"
            )
        for label, value in (("--nodes", self.nodes), ("processes of a node", self.processes)):
            if value < 1:
                raise ConfigError(f"{label}: {value} is less than 1", fix="a job needs at least one process")
        if taken := [name for name, _ in self.environment if name in _RESERVED]:
            raise ConfigError(
                f"--env {taken[0]} is set by the launcher",
                fix="choose the workspace with HEARTH_HOME outside",
            )
        if self.max_restarts < 0 or self.join_timeout < 1:
            raise ConfigError(
                f"--max-restarts {self.max_restarts} and --join-timeout {self.join_timeout} must be at least "
                "0 and 1"
            )

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.nodes * self.processes

    @property
    def job_dir(self) -> str:
        """The folder of the job in the workspace, which its processes and its launcher share."""
        return f"{self.workspace.rstrip('/')}/jobs/{self.name}"

    def variables(self) -> dict[str, str]:
        """What every process finds in its environment besides torchrun's variables."""
        return {"HEARTH_HOME": self.workspace, "HEARTH_JOB_DIR": self.job_dir, **dict(self.environment)}

    def arguments(self) -> list[str]:
        """The arguments of the module `hearth.parallel.launch.start` in every process."""
        resume = ["--resume", self.resume] if self.resume is not None else []
        return [*resume, *([self.recipe] if self.recipe is not None else []), *self.overrides]

    def option(self, name: str, default: str | None = None) -> str | None:
        """A setting of the backend alone."""
        return dict(self.options).get(name, default)

    def to_dict(self) -> dict[str, Any]:
        """For the record of the job."""
        return asdict(self)

    def to_public_dict(self) -> dict[str, Any]:
        """For people and their logs: without the values of variables, which may be secret."""
        return {**asdict(self), "environment": [name for name, _ in self.environment]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of ``to_dict``, also after JSON."""
        known = {each.name for each in fields(cls)}
        found = {key: item for key, item in value.items() if key in known}
        found["resources"] = Resources(**found.get("resources", {}))
        for key in ("environment", "options"):
            found[key] = tuple((name, text) for name, text in found.get(key, ()))
        found["overrides"] = tuple(found.get("overrides", ()))
        return cls(**found)


@dataclass(frozen=True)
class Rendered:
    """What would be submitted: files by name, and the commands that submit or run them, in order."""

    files: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[tuple[str, ...], ...] = ()

    def to_text(self) -> str:
        """For people: each file, then each command."""
        parts = [f"# ── {name} ──\n{text.rstrip()}\n" for name, text in self.files.items()]
        if self.commands:
            lines = [shlex.join(command) for command in self.commands]
            parts.append("# ── commands ──\n" + "\n".join(lines) + "\n")
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"files": dict(self.files), "commands": [list(command) for command in self.commands]}


def parse_duration(text: str) -> int:
    """Seconds of ``90``, ``90s``, ``30m``, ``2h30m``, ``1d`` or Slurm's ``D-HH:MM:SS``."""
    if clock := _CLOCK.fullmatch(text.strip()):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
    elif text.strip() and (match := _DURATION.fullmatch(text.strip())):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    else:
        raise ConfigError(f"{text!r} is no time", fix="write 90s, 30m, 2h30m, 1d or 1-00:00:00")
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ConfigError(f"{text!r} is no time: it is nothing", fix="write 90s, 30m, 2h30m or 1d")
    return total


def parse_memory(text: str) -> int:
    """MiB of ``512M``, ``64G``, ``64GiB`` or ``1.5T``."""
    match = _MEMORY.fullmatch(text.strip())
    size = 0.0
    if match is not None:
        factors = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
        size = float(match.group(1)) * factors[match.group(2).upper()]
    if size < 1:
        raise ConfigError(f"{text!r} is no size of memory", fix="write 512M, 64G or 1.5T")
    return round(size)


def parse_pairs(
    texts: Sequence[str], what: str, *, allowed: Mapping[str, str] | None = None
) -> dict[str, str]:
    """``("a=1", "b=x")`` as a dictionary. Raises ConfigError for what is no pair, or not in ``allowed``."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not (_VARIABLE if allowed is None else _OPTION).fullmatch(key):
            raise ConfigError(f"{what} {text!r} is not NAME=VALUE", fix=f"write {what} NAME=VALUE")
        if allowed is not None and key not in allowed:
            listed = "; ".join(f"{name}: {text}" for name, text in allowed.items()) or "none"
            raise ConfigError(f"{what} has no {key!r} here", fix=f"it knows {listed}")
        found[key] = value
    return found
