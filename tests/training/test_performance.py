"""Where the time of a step goes, in figures that a clock of known times must give."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from hearth.errors import ConfigError, Interrupted
from hearth.training import Callback, Trainer
from hearth.training.performance import PHASES, StepClock, performance_report
from hearth.workspace import Workspace

MakeTrainer = Callable[..., Trainer]


class FakeTimer:
    """A clock that is set by hand; ``late`` marks are not known yet, as on a GPU."""

    def __init__(self) -> None:
        self.now, self.known_until = 0.0, float("inf")

    def mark(self) -> float:
        return self.now

    def seconds(self, first: float, second: float) -> float | None:
        return second - first if second <= self.known_until else None


@pytest.fixture
def clock() -> tuple[StepClock, FakeTimer]:
    made, timer = StepClock(), FakeTimer()
    made._timer = timer
    return made, timer


def one_step(clock: StepClock, timer: FakeTimer, scale: float = 1.0) -> None:
    for phase, seconds in (
        ("data", 0.01),
        *[("data", 0.0), ("forward", 0.1), ("backward", 0.2)] * 2,
        ("optimizer", 0.05),
    ):
        clock.phase(phase)
        timer.now += seconds * scale
    clock.step_done(100)


def test_phases_add_up(clock: tuple[StepClock, FakeTimer]) -> None:
    watch, timer = clock
    one_step(watch, timer)
    timer.now += 0.02  # recording
    with watch.apart("evaluation"):
        timer.now += 7.0
    timer.now += 0.01
    with watch.apart("checkpoint"):
        timer.now += 5.0
    one_step(watch, timer, scale=2.0)
    assert {name: list(values) for name, values in watch.seconds.items()} == {
        "data": pytest.approx([0.01, 0.02]),
        "forward": pytest.approx([0.2, 0.4]),
        "backward": pytest.approx([0.4, 0.8]),
        "optimizer": pytest.approx([0.05, 0.1]),
        "other": pytest.approx([0.0, 0.03]),
    }


def test_steps_that_the_gpu_has_not_done_wait(clock: tuple[StepClock, FakeTimer]) -> None:
    watch, timer = clock
    timer.known_until = 0.5
    one_step(watch, timer)
    one_step(watch, timer)
    assert len(watch.num_tokens) == 0
    timer.known_until = 1.4
    one_step(watch, timer)
    assert list(watch.num_tokens) == [100, 100]
    assert watch.seconds["forward"] == pytest.approx([0.2, 0.2])


def test_the_report() -> None:
    seconds = {
        "data": [9.0, 0.01, 0.01, 0.01],
        "forward": [9.0, 0.3, 0.3, 0.3],
        "backward": [9.0, 0.6, 0.6, 0.6],
        "optimizer": [9.0, 0.08, 0.08, 0.08],
        "other": [9.0, 0.01, 0.01, 1.01],
    }
    found = performance_report(
        seconds, [5, 50, 100, 150], flops_per_token=6e6, peak_flops=1e9, peak_memory_bytes=123
    )
    assert found["num_steps"] == 3  # the first one warms up
    assert found["step_seconds_p50"] == pytest.approx(1.0)
    assert found["step_seconds_p95"] == pytest.approx(1.9)
    assert found["tokens_per_second"] == pytest.approx(300 / 4.0)
    assert found["mfu"] == pytest.approx(75 * 6e6 / 1e9)
    assert "75 * 6e+06 / 1e+09" in found["mfu_formula"]
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    assert found["shares"]["backward"] == pytest.approx(1.8 / 4)
    assert found["loop_overhead"] == pytest.approx((0.03 + 1.03) / 4)
    empty = {name: [] for name in PHASES}
    assert performance_report(empty, [], flops_per_token=1, peak_flops=1, peak_memory_bytes=1) == {
        "num_steps": 0
    }


def test_a_run_leaves_its_figures(train_parts: MakeTrainer) -> None:
    class Slow(Callback):
        def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
            time.sleep(0.05)

    sections: dict[str, Any] = {"train": {"steps": 6, "evaluate_every": 2}}
    plain = train_parts(**sections).fit().summary["performance"]
    slow_run = train_parts(callbacks=[Slow()], **sections).fit()
    slow = slow_run.summary["performance"]
    assert json.loads((slow_run.dir / "performance.json").read_text()) == slow
    assert plain["num_steps"] == slow["num_steps"] == 5
    assert sum(plain["shares"].values()) == pytest.approx(1.0)
    assert plain["shares"]["forward"] > 0.1
    assert plain["shares"]["backward"] > 0.1
    assert slow["shares"]["other"] > plain["shares"]["other"]
    assert slow["step_seconds_p50"] > 0.05  # a callback's time is the step's
    assert slow["peak_memory_bytes"] > 1e7


def test_measuring_leaves_the_clock_alone(train_parts: MakeTrainer) -> None:
    trainer = train_parts()
    trainer.measure_step_seconds(1)
    assert len(trainer.clock.num_tokens) == 0


def trace_names(path: Any) -> list[str]:
    return [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]


def test_a_profile_on_request(train_parts: MakeTrainer) -> None:
    run = train_parts(train={"steps": 5, "profile_steps": [2, 3]}).fit()
    (trace,) = (run.dir / "profile").iterdir()
    assert trace.name == "steps-2-3.json"
    names = trace_names(trace)
    assert any("aten::mm" in name for name in names)
    assert sum("Optimizer.step" in name for name in names) == 2


def test_a_profile_that_is_cut_short(train_parts: MakeTrainer, workspace: Workspace) -> None:
    class Stop(Callback):
        def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
            trainer.request_stop("test")

    sections: dict[str, Any] = {"train": {"steps": 5, "profile_steps": [1, 3]}}
    with pytest.raises(Interrupted):
        train_parts(callbacks=[Stop()], **sections).fit()
    run = workspace.runs.list()[0]
    assert [path.name for path in (run.dir / "profile").iterdir()] == ["steps-1-1.json"]
    train_parts(resume=run.id, **sections).fit()
    assert sorted(path.name for path in (run.dir / "profile").iterdir()) == [
        "steps-1-1.json",
        "steps-2-3.json",
    ]


@pytest.mark.parametrize(
    ("window", "match"),
    [([3, 2], r"\[3, 2\] is no window"), ([9, 10], r"\[9, 10\] never comes: the run has 8")],
)
def test_windows_that_cannot_be(train_parts: MakeTrainer, window: list[int], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        train_parts(train={"profile_steps": window})
