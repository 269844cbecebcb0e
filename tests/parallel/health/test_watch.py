"""Verdicts on processes, by their properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearth.parallel.health.heartbeat import Beat
from hearth.parallel.health.watch import (
    Health,
    Policy,
    Process,
    describe_exit,
    ended,
    heard,
    judge,
    suspects,
)

POLICY = Policy(
    hang_seconds=10.0, hang_steps=5.0, quiet_seconds=100.0, straggler_ratio=1.5, window=8, enough=3
)
seconds = st.floats(0.001, 1000.0)


def beat(rank: int, step: int, step_seconds: float | None = 1.0, phase: str = "training") -> Beat:
    return Beat(rank, 100 + rank, "host", step, phase, float(step), step_seconds)  # type: ignore[arg-type]


def worked(rank: int, times: list[float], now: float = 0.0) -> Process:
    process = Process(rank, 0.0)
    for step, took in enumerate(times):
        process = heard(process, beat(rank, step, took), now, POLICY)
    return process


def healths(processes: list[Process], now: float, policy: Policy = POLICY) -> list[Health]:
    return [verdict.health for verdict in judge(processes, policy, now)]


@given(silence=st.floats(0.0, 10_000.0), usual=st.floats(0.001, 500.0))
def test_a_process_hangs_exactly_when_it_is_silent_for_longer_than_allowed(
    silence: float, usual: float
) -> None:
    process = worked(0, [usual] * 4)
    limit = max(POLICY.hang_seconds, POLICY.hang_steps * usual)
    assert (healths([process], silence) == [Health.HUNG]) == (silence > limit)


@given(
    silence=st.floats(0.0, 1000.0), phase=st.sampled_from(["starting", "evaluating", "saving", "finishing"])
)
def test_phases_without_steps_and_the_start_are_given_more_time(silence: float, phase: str) -> None:
    saving = heard(Process(0, 0.0), beat(0, 1, phase=phase), 0.0, POLICY)
    expected = silence > POLICY.quiet_seconds
    assert (healths([saving], silence) == [Health.HUNG]) == expected
    assert (healths([Process(0, 0.0)], silence) == [Health.HUNG]) == expected


@given(times=st.lists(seconds, min_size=2, max_size=6), scale=st.floats(0.01, 100.0))
def test_whether_a_process_is_slow_depends_on_ratios_alone(times: list[float], scale: float) -> None:
    near = [t for t in times if any(abs(t / (POLICY.straggler_ratio * u) - 1) < 1e-6 for u in times)]
    patient = replace(POLICY, hang_seconds=1e9)
    if not near:
        a = [worked(rank, [took] * 5) for rank, took in enumerate(times)]
        b = [worked(rank, [took * scale] * 5) for rank, took in enumerate(times)]
        assert healths(a, 0.0, patient) == healths(b, 0.0, patient)


@given(times=st.lists(st.floats(1.0, 1.49), min_size=1, max_size=8))
def test_nobody_is_slow_among_equals(times: list[float]) -> None:
    processes = [worked(rank, [took] * 5) for rank, took in enumerate(times)]
    assert set(healths(processes, 0.0)) == {Health.FINE}


@given(size=st.integers(2, 9), slow=st.integers(0, 8), ratio=st.floats(1.6, 50.0), order=st.randoms())
def test_one_slow_process_is_found_wherever_it_stands(
    size: int, slow: int, ratio: float, order: object
) -> None:
    slow %= size
    processes = [worked(rank, [ratio if rank == slow else 1.0] * 5) for rank in range(size)]
    order.shuffle(processes)  # type: ignore[attr-defined]
    verdicts = judge(processes, POLICY, 0.0)
    assert [verdict.rank for verdict in verdicts if verdict.health is Health.STRAGGLER] == [slow]


def test_a_few_slow_steps_are_no_straggler_and_old_ones_are_forgotten() -> None:
    steady = worked(0, [1.0] * 8)
    assert healths([steady, worked(1, [9.0] * 2)], 0.0)[1] is Health.FINE  # too few to tell
    assert healths([steady, worked(1, [1.0] * 5 + [9.0] * 3)], 0.0)[1] is Health.FINE
    assert healths([steady, worked(1, [9.0] * 8)], 0.0)[1] is Health.STRAGGLER
    assert healths([steady, worked(1, [9.0] * 8 + [1.0] * 8)], 0.0)[1] is Health.FINE


@given(code=st.integers(-64, 255))
def test_an_end_is_final_whatever_the_heartbeats_say(code: int) -> None:
    process = ended(worked(0, [1.0] * 5), code, 1.0)
    assert healths([process], 1e9) == [Health.DONE if code == 0 else Health.DEAD]


def test_reading_the_same_heartbeat_again_is_no_sign_of_life() -> None:
    once = heard(Process(0, 0.0), beat(0, 3), 5.0, POLICY)
    again = heard(once, beat(0, 3), 50.0, POLICY)
    assert again == once
    assert healths([again], 50.0) == [Health.HUNG]
    # Two heartbeats of one step are one step, though the second is a sign of life.
    second = heard(once, replace(beat(0, 3), time=9.0), 50.0, POLICY)
    assert (second.heard_at, second.step_seconds) == (50.0, (1.0,))


@given(steps=st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_suspects_are_the_silent_ones_that_came_least_far(steps: list[int]) -> None:
    processes = [heard(Process(r, 0.0), beat(r, step), float(r), POLICY) for r, step in enumerate(steps)]
    now = 10_000.0
    verdicts = judge(processes, POLICY, now)
    assert suspects(processes, verdicts) == [r for r, step in enumerate(steps) if step == min(steps)]
    assert suspects(processes, judge(processes, POLICY, 5.0)) == []


@pytest.mark.parametrize(
    ("code", "words"), [(3, "exit code 3"), (-11, "killed by SIGSEGV"), (-99, "killed by signal 99")]
)
def test_exits_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words
