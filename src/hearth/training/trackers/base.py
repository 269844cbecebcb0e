"""What a tracker is: something that is told what a run does, beside the workspace, which always records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import ValidationError

from hearth.config.problems import describe
from hearth.config.section import Section
from hearth.errors import ConfigError

EndStatus = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run when it starts, or goes on."""

    run_id: str
    name: str
    folder: Path  # the run's own
    workspace: Path
    recipe: Mapping[str, Any]  # resolved
    recipe_hash: str
    recipe_yaml: str
    tags: Mapping[str, str] = field(default_factory=dict)
    first_step: int = 0  # steps done before; more than 0 where a run goes on
    resumed: bool = False


@dataclass(frozen=True)
class Point:
    """Values of one step; ``time`` in seconds since the epoch."""

    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Artifact:
    """Something that the run left on disk, by reference: trackers copy no weights."""

    kind: str  # checkpoint, model, adapter, version, trace, ...
    uri: str
    step: int
    facts: Mapping[str, str] = field(default_factory=dict)


class NoOptions(Section):
    """The options of a tracker that has none."""


O = TypeVar("O", bound=Section)  # noqa: E741 - the options of a tracker


class Tracker(Generic[O]):
    """Base of all trackers; a package adds one by the entry-point group ``hearth.trackers``.

    All methods but ``__init__`` are called from one thread of their own, in order, and may be slow or raise:
    training does not wait for them. A run that is resumed must continue under ``facts.run_id``.
    """

    name: ClassVar[str] = ""
    libraries: ClassVar[tuple[str, ...]] = ()  # modules that must be importable
    extra: ClassVar[str] = ""  # what to install them with: hearth-lm[EXTRA]
    options_class: ClassVar[type[Section]] = NoOptions

    def __init__(self, options: O) -> None:
        self.options = options

    def start(self, facts: RunFacts) -> None:
        """Open the run, or continue it when ``facts.resumed``; leave the recipe and its hash there."""
        raise NotImplementedError

    def log(self, points: Sequence[Point]) -> None:
        """Record points, in order. After a resume, steps may come again."""
        raise NotImplementedError

    def artifact(self, artifact: Artifact) -> None:
        """Record a reference."""

    def finish(self, status: EndStatus, summary: Mapping[str, Any], error: str | None) -> None:
        """Record how the run ended, and close."""
        raise NotImplementedError


def parse_options(cls: type[Tracker[Any]], options: Mapping[str, Any]) -> Section:
    """The options of a tracker from ``track.options.NAME``. Raises ConfigError that names key and value."""
    value = dict(options)
    try:
        return cls.options_class.model_validate(value)
    except ValidationError as error:
        place = f"track.options.{cls.name}."
        problems = [place + line for line in describe(cls.options_class, error, value, lambda _key: None)]
        raise ConfigError("\n".join(problems)) from error


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 3}} → {"train.steps": 3}; lists stay whole, an empty mapping is left out."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            found.update(flatten(item, f"{name}."))
        else:
            found[name] = item
    return found


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a summary, those of nested mappings by dotted names."""
    return {
        key: float(value)
        for key, value in flatten(summary).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
