"""When to restart a worker, and when to stop trying: a pure function of how long each one lived."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RestartPolicy:
    """Exponential backoff over quick failures.

    A worker that was ready for at least ``stable_seconds`` clears the count. After ``limit`` quick failures
    in a row there is no further attempt: a model that cannot run would only burn the machine.
    """

    backoff: float = 0.5
    max_backoff: float = 30.0
    stable_seconds: float = 60.0
    limit: int = 5

    def after_failure(self, quick_failures: int, ready_seconds: float) -> tuple[int, float | None]:
        """The new count and the wait before the next attempt, or None to give up.

        ``quick_failures`` is the count before this failure; ``ready_seconds`` is how long the worker that
        failed had been ready, 0 if it never was.
        """
        count = 1 if ready_seconds >= self.stable_seconds else quick_failures + 1
        if count >= self.limit:
            return count, None
        return count, min(self.backoff * 2.0 ** (count - 1), self.max_backoff)
