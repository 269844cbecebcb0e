"""What is wrong with a group of processes, by heartbeats, exit codes and a clock. Pure.

Times are seconds of the watcher's own monotonic clock. When a heartbeat was heard counts, not when it says it
was written: clocks of other machines may be wrong, and any clock may be set while a job runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from hearth.parallel.health.heartbeat import Beat


class Health(StrEnum):
    """The state of one process."""

    STARTING = "starting"  # no heartbeat yet
    FINE = "fine"
    STRAGGLER = "straggler"  # its own work takes longer than that of the others
    HUNG = "hung"  # it runs, but has been silent for too long
    DEAD = "dead"  # it ended before its work was done
    DONE = "done"


@dataclass(frozen=True)
class Policy:
    """How patient to be. Seconds, and ratios of times.

    ``hang_seconds`` holds while training, and grows to ``hang_steps`` times the usual step where steps are
    long; ``quiet_seconds`` holds before the first heartbeat and in phases that have no steps, such as saving.
    """

    hang_seconds: float = 300.0
    hang_steps: float = 10.0
    quiet_seconds: float = 1800.0
    straggler_ratio: float = 1.5
    window: int = 20  # steps of which the median is taken
    enough: int = 5  # steps below which nobody is called slow


@dataclass(frozen=True)
class Process:
    """What the watcher knows of one rank. ``heard_at`` is its start until it has said something."""

    rank: int
    heard_at: float
    beat: Beat | None = None
    step_seconds: tuple[float, ...] = ()
    exit_code: int | None = None
    ended_at: float | None = None

    @property
    def median_step(self) -> float | None:
        """The usual time of its own work in a step."""
        return statistics.median(self.step_seconds) if self.step_seconds else None


@dataclass(frozen=True)
class Verdict:
    """What one process is found to be, and why in a few words."""

    rank: int
    health: Health
    why: str = ""


def heard(process: Process, beat: Beat, now: float, policy: Policy) -> Process:
    """The process after the watcher has read ``beat``; reading the same one again changes nothing."""
    if beat == process.beat:
        return process
    seconds = process.step_seconds
    is_new_step = process.beat is None or beat.step != process.beat.step
    if beat.phase == "training" and beat.step_seconds is not None and is_new_step:
        seconds = (*seconds, beat.step_seconds)[-policy.window :]
    return replace(process, heard_at=now, beat=beat, step_seconds=seconds)


def ended(process: Process, exit_code: int, now: float) -> Process:
    """The process after its end."""
    return replace(process, exit_code=exit_code, ended_at=now)


def judge(processes: Sequence[Process], policy: Policy, now: float) -> list[Verdict]:
    """A verdict for each process, in their order."""
    medians = {each.rank: each.median_step for each in processes}
    usual = [median for median in medians.values() if median is not None]
    patience = max(policy.hang_seconds, policy.hang_steps * statistics.median(usual) if usual else 0.0)
    return [_judge_one(each, medians, patience, policy, now) for each in processes]


def _judge_one(
    process: Process, medians: dict[int, float | None], patience: float, policy: Policy, now: float
) -> Verdict:
    if process.exit_code is not None:
        if process.exit_code == 0:
            return Verdict(process.rank, Health.DONE)
        return Verdict(process.rank, Health.DEAD, describe_exit(process.exit_code))
    silence = now - process.heard_at
    if process.beat is None:
        if silence > policy.quiet_seconds:
            return Verdict(process.rank, Health.HUNG, f"no heartbeat in {silence:.0f} s since its start")
        return Verdict(process.rank, Health.STARTING)
    phase = process.beat.phase
    allowed = patience if phase == "training" else max(patience, policy.quiet_seconds)
    if silence > allowed:
        why = f"silent for {silence:.0f} s ({phase}, step {process.beat.step})"
        return Verdict(process.rank, Health.HUNG, why)
    others = [median for rank, median in medians.items() if rank != process.rank and median is not None]
    own = medians[process.rank]
    if own is not None and others and len(process.step_seconds) >= policy.enough:
        usual = statistics.median(others)
        if own > policy.straggler_ratio * usual:
            why = f"{own:.3g} s a step, the others {usual:.3g} s"
            return Verdict(process.rank, Health.STRAGGLER, why)
    return Verdict(process.rank, Health.FINE)


def suspects(processes: Sequence[Process], verdicts: Sequence[Verdict]) -> list[int]:
    """The hung ranks that the others probably wait for: those that came least far, most silent first.

    Processes of one step wait for each other, so one that hangs soon silences all.
    """
    hung = {each.rank for each in verdicts if each.health is Health.HUNG}
    silent = [each for each in processes if each.rank in hung]
    if not silent:
        return []
    steps = {each.rank: -1 if each.beat is None else each.beat.step for each in silent}
    least = min(steps.values())
    behind = [each for each in silent if steps[each.rank] == least]
    return [each.rank for each in sorted(behind, key=lambda each: (each.heard_at, each.rank))]


def describe_exit(exit_code: int) -> str:
    """``exit code 3``, or the signal that ended a process."""
    import signal

    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = ", out of memory perhaps" if -exit_code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"
