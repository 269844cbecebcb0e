"""Trackers by name: those that come with Hearth, and those that packages register."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from hearth.errors import ConfigError
from hearth.training.trackers.base import Tracker, parse_options

GROUP = "hearth.trackers"
_BUILT_IN = {
    "tensorboard": "hearth.training.trackers.tensorboard:TensorBoardTracker",
    "mlflow": "hearth.training.trackers.mlflow:MlflowTracker",
    "wandb": "hearth.training.trackers.wandb:WandbTracker",
    "comet": "hearth.training.trackers.comet:CometTracker",
}


def tracker_names() -> list[str]:
    """Every name that ``track.trackers`` may have here."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=GROUP))})


def make_trackers(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Tracker[Any]]:
    """The trackers of ``track.trackers`` with ``track.options``, not yet started.

    Raises ConfigError for an unknown name, a name given twice, an unknown option, or a library that is
    missing. Options of a tracker that is not in use are checked only for their name.
    """
    options = options or {}
    for name in options:
        _require_known(f"track.options.{name}", name)
    for name in names:
        _require_known("track.trackers", name)
        if list(names).count(name) > 1:
            raise ConfigError(f"track.trackers: {name} is given twice", fix="name each tracker once")
    return [_make(name, options.get(name, {})) for name in names]


def _require_known(place: str, name: str) -> None:
    known = tracker_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{place}: no tracker {name!r}{hint}", fix=f"use any of {', '.join(known)}")


def _make(name: str, options: Mapping[str, Any]) -> Tracker[Any]:
    target = _BUILT_IN.get(name)
    if target is not None:
        point = EntryPoint(name, target, GROUP)
    else:
        point = next(iter(entry_points(group=GROUP, name=name)))
    try:
        cls: type[Tracker[Any]] = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"tracker {name} ({point.value}) cannot be loaded: {error}", fix="repair or remove its package"
        ) from error
    for library in cls.libraries:
        if importlib.util.find_spec(library) is None:
            extra = f"pip install 'hearth-lm[{cls.extra}]'" if cls.extra else f"install {library}"
            raise ConfigError(f"track.trackers: {name} needs {library}, which is not installed", fix=extra)
    return cls(parse_options(cls, options))
