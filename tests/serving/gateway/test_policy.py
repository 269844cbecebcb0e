"""The restart policy, as the pure function it is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hearth.serving.gateway.policy import RestartPolicy


def test_quick_failures_back_off_and_end() -> None:
    policy = RestartPolicy(backoff=0.5, max_backoff=30.0, stable_seconds=60.0, limit=5)
    count, waits = 0, []
    while True:
        count, wait = policy.after_failure(count, 0.1)
        if wait is None:
            break
        waits.append(wait)
    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_a_worker_that_lived_long_clears_the_count() -> None:
    policy = RestartPolicy(limit=3)
    assert policy.after_failure(2, 3600.0) == (1, policy.backoff)


@given(
    limit=st.integers(1, 10),
    lives=st.lists(st.floats(0.0, 200.0), max_size=30),
)
def test_it_gives_up_exactly_after_limit_quick_failures_in_a_row(limit: int, lives: list[float]) -> None:
    policy = RestartPolicy(limit=limit)
    count = in_a_row = 0
    for life in lives:
        in_a_row = 1 if life >= policy.stable_seconds else in_a_row + 1
        count, wait = policy.after_failure(count, life)
        assert (wait is None) == (in_a_row >= limit)
        if wait is None:
            return
        assert policy.backoff <= wait <= policy.max_backoff
