"""The way to one tracker: a bounded queue, and a thread that empties it.

Training offers and goes on. What the tracker cannot take is counted, and its first failure is said once; it
never stops a run, and a run's end waits for it only so long.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hearth.training.trackers.base import Artifact, EndStatus, Point, RunFacts, Tracker

CAPACITY = 10_000  # events that may wait
_BATCH = 500
# After a failure a tracker is left alone this long, then twice as long, up to the limit.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
# User and password of an address: libraries quote it in their errors, which end up in the run's record.
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass
class Delivery:
    """What became of what was offered to a tracker."""

    delivered: int = 0
    lost: int = 0  # the queue was full, the tracker raised, or it did not answer in time
    error: str | None = None  # the first one

    def as_dict(self) -> dict[str, Any]:
        """For the summary of a run."""
        return {key: value for key, value in vars(self).items() if value is not None}


class Channel:
    """Carries the events of a run to one tracker."""

    def __init__(
        self,
        tracker: Tracker[Any],
        facts: RunFacts,
        *,
        warn: Callable[[str], None],
        capacity: int = CAPACITY,
    ) -> None:
        self.tracker = tracker
        self.delivery = Delivery()
        self._facts = facts
        self._warn = warn
        self._capacity = capacity
        self._waiting: deque[Point | Artifact] = deque()
        self._changed = threading.Condition()  # guards _waiting, _end, _abandoned, delivery
        self._end: tuple[EndStatus, Mapping[str, Any], str | None] | None = None
        self._abandoned = False
        self._pause = _FIRST_PAUSE
        self._thread = threading.Thread(target=self._work, name=f"hearth-tracker-{tracker.name}", daemon=True)
        self._thread.start()

    def offer(self, event: Point | Artifact) -> None:
        """Hand over an event without waiting; a full queue loses it."""
        with self._changed:
            if len(self._waiting) >= self._capacity:
                self.delivery.lost += 1
                first = self.delivery.error is None
                self.delivery.error = self.delivery.error or "too slow: its queue is full"
            else:
                self._waiting.append(event)
                first = False
                self._changed.notify()
        if first:
            self._warn(f"tracker {self.tracker.name} is too slow: its queue is full, metrics are lost there")

    def end(self, status: EndStatus, summary: Mapping[str, Any], error: str | None) -> None:
        """No more events: the tracker finishes once the queue is empty. Does not wait."""
        with self._changed:
            self._end = (status, summary, error)
            self._changed.notify()

    def join(self, deadline: float) -> Delivery:
        """Wait for the end until ``deadline`` (of time.monotonic); then leave the tracker to itself."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            late = self._thread.is_alive()
            if late:
                self._abandoned = True
                self.delivery.lost += len(self._waiting)
                self._waiting.clear()
                self.delivery.error = self.delivery.error or "did not finish in time"
            delivery = Delivery(**vars(self.delivery))
        if late:
            self._warn(
                f"tracker {self.tracker.name} did not finish in time and is left alone; "
                f"{delivery.lost} of {delivery.lost + delivery.delivered} events did not arrive"
            )
        elif delivery.lost:
            self._warn(
                f"tracker {self.tracker.name}: {delivery.lost} of {delivery.lost + delivery.delivered} "
                f"events did not arrive ({delivery.error})"
            )
        return delivery

    # ── in the thread ────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        while not self._attempt(lambda: self.tracker.start(self._facts), 0):
            if self._give_up():
                self._lose_waiting()
                return
        while (group := self._take()) is not None:
            if self._attempt(functools.partial(self._deliver, group), len(group)):
                with self._changed:
                    self.delivery.delivered += len(group)
            elif self._give_up():
                self._lose_waiting()  # do not try them one after the other
        if self._end is not None and not self._abandoned:
            end = self._end
            self._attempt(lambda: self.tracker.finish(*end), 0)

    def _take(self) -> list[Point] | list[Artifact] | None:
        """The next events of one kind; waits for them. None at the end."""
        with self._changed:
            while not self._waiting and self._end is None and not self._abandoned:
                self._changed.wait()
            if not self._waiting or self._abandoned:
                return None
            first = self._waiting.popleft()
            if isinstance(first, Artifact):
                return [first]
            points = [first]
            while self._waiting and isinstance(self._waiting[0], Point) and len(points) < _BATCH:
                points.append(self._waiting.popleft())  # type: ignore[arg-type] # just looked at
            return points

    def _deliver(self, group: list[Point] | list[Artifact]) -> None:
        if isinstance(group[0], Artifact):
            self.tracker.artifact(group[0])
        else:
            self.tracker.log(group)

    def _attempt(self, action: Callable[[], None], num_events: int) -> bool:
        try:
            action()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a tracker may raise whatever it likes
            text = _CREDENTIALS.sub("", f"{type(error).__name__}: {error}".splitlines()[0])
            with self._changed:
                self.delivery.lost += num_events
                first = self.delivery.error is None
                self.delivery.error = self.delivery.error or text
            if first:
                self._warn(f"tracker {self.tracker.name} failed ({text}); training goes on without it")
            return False
        self._pause = _FIRST_PAUSE
        return True

    def _give_up(self) -> bool:
        """After a failure: whether the run has ended. If not, pause; its end still gets one attempt."""
        with self._changed:
            if self._end is not None or self._abandoned:
                return True
            deadline = time.monotonic() + self._pause
            self._pause = min(_LONGEST_PAUSE, self._pause * 2)
            while self._end is None and not self._abandoned and time.monotonic() < deadline:
                self._changed.wait(deadline - time.monotonic())
            return False

    def _lose_waiting(self) -> None:
        with self._changed:
            self.delivery.lost += len(self._waiting)
            self._waiting.clear()
