"""Where the figures of a run go: the workspace first, and from there to every tracker."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hearth.config import recipe_hash, to_dict, to_yaml
from hearth.training.trackers.base import Artifact, EndStatus, Point, RunFacts, Tracker
from hearth.training.trackers.channel import CAPACITY, Channel

if TYPE_CHECKING:
    from hearth.config import Recipe
    from hearth.workspace import Run

# How long the end of a run waits for trackers that still deliver.
FINISH_SECONDS = 30.0


def run_facts(run: Run, recipe: Recipe, *, workspace: Path, first_step: int, resumed: bool) -> RunFacts:
    """What trackers are told at the start."""
    return RunFacts(
        run_id=run.id,
        name=run.name,
        folder=run.dir,
        workspace=workspace,
        recipe=to_dict(recipe),
        recipe_hash=recipe_hash(recipe),
        recipe_yaml=to_yaml(recipe),
        tags=dict(run.tags),
        first_step=first_step,
        resumed=resumed,
    )


class Tracking:
    """Records in the workspace's run and offers the same to every tracker, each in a thread of its own."""

    def __init__(
        self,
        run: Run,
        trackers: Sequence[Tracker[Any]],
        facts: RunFacts,
        *,
        warn: Callable[[str], None],
        capacity: int = CAPACITY,
        finish_seconds: float | None = None,
    ) -> None:
        self._run = run
        self._finish_seconds = FINISH_SECONDS if finish_seconds is None else finish_seconds
        self._channels = [Channel(tracker, facts, warn=warn, capacity=capacity) for tracker in trackers]

    def log_metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Record values of one step; from any thread. Waits for no tracker."""
        self._run.log_metrics(values, step=step)
        if self._channels:
            point = Point(step, time.time(), {name: float(value) for name, value in values.items()})
            for channel in self._channels:
                channel.offer(point)

    def artifact(self, kind: str, path: Path, *, step: int, **facts: str) -> None:
        """Tell the trackers of something on disk; the workspace has it already."""
        artifact = Artifact(kind, path.absolute().as_uri(), step, facts)
        for channel in self._channels:
            channel.offer(artifact)

    def finish(self, status: EndStatus, summary: Mapping[str, Any], error: str | None) -> dict[str, Any]:
        """Tell the trackers how the run ended and wait for them a while; what became of their events.

        Call it before ``run.finish``, and put the result into the summary.
        """
        plain = json.loads(json.dumps(summary, default=str))
        for channel in self._channels:
            channel.end(status, plain, error)
        deadline = time.monotonic() + self._finish_seconds
        return {channel.tracker.name: channel.join(deadline).as_dict() for channel in self._channels}
