"""What a process has in the place of the run and its observers, where another one records them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class _Callbacks:
    error = None

    def __getattr__(self, _name: str) -> Any:
        return _nothing


class FollowedRun:
    """The run that the main process records: its name and folder are known, nothing is written."""

    def __init__(self, run_id: str, directory: Path) -> None:
        self.id, self.dir = run_id, directory
        self.summary: dict[str, Any] = {}

    def flush(self) -> None:
        """Nothing."""

    def finish(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing."""

    def discard_metrics_after(self, _step: int) -> None:
        """Nothing."""


class NoObservers:
    """Takes what is told, and tells nobody."""

    def __init__(self) -> None:
        self.callbacks: Any = _Callbacks()

    def log_metrics(self, _values: Mapping[str, float], *, step: int) -> None:
        """Nothing."""

    def saved(self, _step: int, _path: Path) -> None:
        """Nothing."""

    def end_callbacks(self, _status: str) -> None:
        """Nothing."""

    def end(self, _status: str, summary: Mapping[str, Any], _error: str | None = None) -> dict[str, Any]:
        """The summary."""
        return dict(summary)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None
