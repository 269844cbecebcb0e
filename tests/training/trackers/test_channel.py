"""The way to a tracker: it loses rather than waits, says so once, and counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hearth.training.trackers import Artifact, NoOptions, Point, RunFacts, Tracker
from hearth.training.trackers import channel as channel_module
from hearth.training.trackers.channel import Channel


class Recorder(Tracker[NoOptions]):
    """Keeps what it gets; fails or hangs where it is told to."""

    name = "recorder"

    def __init__(self, fail: Callable[[str], None] = lambda _what: None) -> None:
        super().__init__(NoOptions())
        self.fail = fail
        self.points: list[Point] = []
        self.artifacts: list[Artifact] = []
        self.events: list[str] = []

    def start(self, facts: RunFacts) -> None:
        self.fail("start")
        self.events.append(f"start {facts.run_id}")

    def log(self, points: Sequence[Point]) -> None:
        self.fail("log")
        self.points += points

    def artifact(self, artifact: Artifact) -> None:
        self.fail("artifact")
        self.artifacts.append(artifact)

    def finish(self, status: str, summary: Mapping[str, Any], error: str | None) -> None:
        self.fail("finish")
        self.events.append(f"finish {status} {dict(summary)} {error}")


@pytest.fixture
def facts(tmp_path: Path) -> RunFacts:
    return RunFacts("r1", "a run", tmp_path, tmp_path, {"train": {"steps": 3}}, "abc", "train: {}\n")


def point(step: int) -> Point:
    return Point(step, 0.0, {"loss": float(step)})


def close(channel: Channel, seconds: float = 10.0) -> dict[str, Any]:
    channel.end("finished", {"loss": 1.0}, None)
    return channel.join(time.monotonic() + seconds).as_dict()


def test_everything_arrives_in_order(facts: RunFacts) -> None:
    said: list[str] = []
    tracker = Recorder()
    channel = Channel(tracker, facts, warn=said.append)
    for step in range(1500):
        channel.offer(point(step))
        if step == 700:
            channel.offer(Artifact("model", "file:///m", step))
    assert close(channel) == {"delivered": 1501, "lost": 0}
    assert [p.step for p in tracker.points] == list(range(1500))
    assert tracker.artifacts == [Artifact("model", "file:///m", 700)]
    assert tracker.events == ["start r1", "finish finished {'loss': 1.0} None"]
    assert said == []


def test_a_tracker_opens_before_the_first_event(facts: RunFacts) -> None:
    opened = threading.Event()
    channel = Channel(Recorder(lambda _what: opened.set()), facts, warn=print)
    assert opened.wait(10)
    close(channel)


def test_one_that_raises_is_said_once_and_counted(facts: RunFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "_FIRST_PAUSE", 0.01)
    broken = {"now": True}

    def fail(what: str) -> None:
        if what == "log" and broken["now"]:
            raise ConnectionError("no route to host")

    said: list[str] = []
    tracker = Recorder(fail)
    channel = Channel(tracker, facts, warn=said.append)
    for step in range(5):
        channel.offer(point(step))
        while channel.delivery.lost <= step:
            time.sleep(0.002)
    broken["now"] = False  # it comes back: what is offered from now on arrives
    channel.offer(point(5))
    found = close(channel)
    assert found == {"delivered": 1, "lost": 5, "error": "ConnectionError: no route to host"}
    assert [p.step for p in tracker.points] == [5]
    assert len(said) == 2
    assert "failed (ConnectionError: no route to host); training goes on without it" in said[0]
    assert "5 of 6 events did not arrive" in said[1]


def test_no_password_of_a_server_is_said_or_recorded(facts: RunFacts) -> None:
    def fail(_what: str) -> None:
        raise ConnectionError("no answer from http://me:s3cret@host:5000/api and mysql://you:pw@db/x")

    said: list[str] = []
    channel = Channel(Recorder(fail), facts, warn=said.append)
    channel.offer(point(1))
    found = close(channel)
    assert found["error"] == "ConnectionError: no answer from http://host:5000/api and mysql://db/x"
    assert "s3cret" not in "".join(said)


def test_one_that_cannot_start_yet_gets_everything_later(
    facts: RunFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "_FIRST_PAUSE", 0.01)
    attempts: list[str] = []

    def fail(what: str) -> None:
        if what == "start":
            attempts.append(what)
            if len(attempts) < 3:
                raise TimeoutError("not yet")

    said: list[str] = []
    tracker = Recorder(fail)
    channel = Channel(tracker, facts, warn=said.append)
    for step in range(20):
        channel.offer(point(step))
    while not tracker.points:
        time.sleep(0.002)
    assert close(channel)["delivered"] == 20
    assert [p.step for p in tracker.points] == list(range(20))
    assert len(said) == 1


@pytest.mark.parametrize("where", ["start", "log"])
def test_one_that_hangs_is_left_alone(facts: RunFacts, where: str) -> None:
    release = threading.Event()

    def fail(what: str) -> None:
        if what == where:
            release.wait(30)

    said: list[str] = []
    channel = Channel(Recorder(fail), facts, warn=said.append, capacity=50)
    began = time.monotonic()
    slowest = 0.0
    for step in range(2000):
        before = time.perf_counter()
        channel.offer(point(step))
        slowest = max(slowest, time.perf_counter() - before)
    found = close(channel, 0.2)
    assert time.monotonic() - began < 5
    assert slowest < 0.5  # offering never waits for the tracker
    assert found["delivered"] == 0
    assert found["lost"] >= 1900
    assert "too slow" in found["error"]
    assert [("too slow" in text, "did not finish in time" in text) for text in said] == [
        (True, False),
        (False, True),
    ]
    release.set()


def test_one_that_exits_the_process_does_not(facts: RunFacts) -> None:
    def fail(what: str) -> None:
        raise SystemExit(3)

    said: list[str] = []
    channel = Channel(Recorder(fail), facts, warn=said.append)
    channel.offer(point(1))
    assert close(channel) == {"delivered": 0, "lost": 1, "error": "SystemExit: 3"}
    assert len(said) == 2


def test_memory_is_bounded(facts: RunFacts) -> None:
    release = threading.Event()
    channel = Channel(Recorder(lambda _what: release.wait(30) and None), facts, warn=print, capacity=10)
    for step in range(100):
        channel.offer(point(step))
    assert len(channel._waiting) <= 10
    release.set()
    assert close(channel)["delivered"] == 10
