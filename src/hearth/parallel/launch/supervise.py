"""Keep a job running: watch its processes, tell what went wrong, kill and restart the whole group.

A group of synchronous processes is as alive as its weakest: when one is dead or hangs, the others wait for
it in a collective. So all are killed, and all start again from the last checkpoint, a few times at most.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hearth.parallel.health.cause import Death, blame, first_death, last_lines
from hearth.parallel.health.heartbeat import Beat, read_beats, read_run
from hearth.parallel.health.watch import (
    Health,
    Policy,
    Process,
    Verdict,
    describe_exit,
    ended,
    heard,
    judge,
    suspects,
)
from hearth.parallel.launch.backend import Watch
from hearth.parallel.launch.spec import State

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 1.0  # after the first death, for others to say why they end, too
_LOST_SECONDS = 10.0  # for those that cannot save any more, as one that they need is gone
_REFUSED = 2  # exit code for input that is wrong: it will be wrong again
_INTERRUPTED = 130
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_MAX_PORTS = 5
_LONGEST_GAP = 1.0


class Group(Protocol):
    """The processes of one start, wherever they run."""

    def exit_codes(self) -> Mapping[int, int]: ...
    def deaths(self) -> list[Death]: ...
    def stopped(self) -> list[int]: ...
    def stacks(self) -> Mapping[int, str]: ...
    def tail(self, rank: int) -> str: ...
    def new_lines(self, *, last: bool = False) -> list[tuple[int, str]]: ...
    def signal(self, number: int) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class Failure:
    """Why one start of a group ended: the rank that failed first, how, and what it or all of them left."""

    attempt: int
    rank: int
    why: str
    step: int | None = None
    tail: str = ""
    stacks: Mapping[int, str] = field(default_factory=dict)
    silent: tuple[int, ...] = ()  # ranks that did not answer when asked for their stacks
    exit_code: int | None = None

    @property
    def is_final(self) -> bool:
        """Whether another start would end the same way: what was given is wrong, or somebody ended it."""
        return self.exit_code in (_REFUSED, _INTERRUPTED)

    @property
    def is_port_taken(self) -> bool:
        """Whether somebody took the port between our choice and its use."""
        return self.step is None and self.exit_code is not None and bool(_PORT_TAKEN.search(self.tail))

    def is_answer_to(self, stop: StopRequest) -> bool:
        """Whether this is how processes end that are asked to stop."""
        asked = (_INTERRUPTED, -signal.SIGTERM, *([-signal.SIGKILL] if stop.count > 1 else []))
        return self.exit_code in asked

    def describe(self) -> str:
        """For people: a line, then what there is to see."""
        at = "" if self.step is None else f" at step {self.step}"
        lines = [f"rank {self.rank} failed{at}: {self.why}"]
        if self.tail:
            lines += [f"  its last lines:\n{_indent(self.tail)}"]
        for rank, text in sorted(self.stacks.items()):
            lines += [f"  stacks of rank {rank}:\n{_indent(text)}"]
        if self.silent:
            lines += [f"  no answer from rank {', '.join(map(str, self.silent))}: stopped, or in the kernel"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Outcome:
    """How a job ended, after how many restarts, and every failure on the way."""

    state: State
    restarts: int
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Patience:
    """How often a job is started again, and how long to wait before."""

    max_restarts: int = 3
    first_delay: float = 1.0
    longest_delay: float = 60.0
    policy: Policy = field(default_factory=Policy)

    def delay(self, restarts: int) -> float:
        """Seconds before restart number ``restarts`` (from 1): doubles each time."""
        return min(self.longest_delay, self.first_delay * 2.0 ** (restarts - 1))


class StopRequest:
    """Ctrl-C, SIGTERM or SIGHUP to the launcher: the first is passed on, the second ends all at once."""

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # What nohup, or a shell for its background jobs, has switched off stays off.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _take(self, number: int, _frame: object) -> None:
        self.count += 1
        self.name = signal.Signals(number).name


def supervise(
    start: Callable[[int], AbstractContextManager[Group]],
    world_size: int,
    job_dir: Path,
    *,
    patience: Patience,
    stop: StopRequest,
    watch: Watch,
) -> Outcome:
    """Run a job to its end. ``start`` starts all its processes; its argument counts from 0."""
    failures: list[Failure] = []
    attempts = restarts = 0
    while True:
        stale = _beats(job_dir)
        with start(attempts) as group:
            watcher = _Watcher(group, world_size, job_dir, patience.policy, stop, watch, stale)
            failure = watcher.run(attempts)
        attempts += 1
        if failure is None:
            return Outcome("finished", restarts, tuple(failures))
        asked = stop.count > 0 and failure.is_answer_to(stop)
        if not asked:
            failures.append(failure)
            watch.note(failure.describe())
        if stop.count or failure.exit_code == _INTERRUPTED:
            return Outcome("interrupted", restarts, tuple(failures))
        if failure.is_port_taken and attempts - restarts < _MAX_PORTS:
            continue
        if failure.is_final or restarts >= patience.max_restarts:
            return Outcome("failed", restarts, tuple(failures))
        restarts += 1
        if not _wait(patience.delay(restarts), restarts, patience, job_dir, stop, watch):
            return Outcome("interrupted", restarts - 1, tuple(failures))


def _wait(
    delay: float, restarts: int, patience: Patience, job_dir: Path, stop: StopRequest, watch: Watch
) -> bool:
    """Wait before a restart; False when somebody asks to stop meanwhile."""
    run = read_run(job_dir)
    where = f"from the last checkpoint of run {run.id}" if run and run.has_checkpoint else "from the start"
    watch.note(f"restart {restarts} of {patience.max_restarts} in {delay:g} s, {where}")
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline and not stop.count:
        time.sleep(_POLL_SECONDS)
    return stop.count == 0


def _beats(job_dir: Path) -> dict[int, Beat]:
    run = read_run(job_dir)
    return {} if run is None else read_beats(run.dir)


class _Clock:
    """Seconds during which somebody looked.

    When the launcher itself did not run, on a machine that slept or in a container that was frozen, the
    processes did probably not run either, and their silence means nothing.
    """

    def __init__(self) -> None:
        self._last, self._sum = time.monotonic(), 0.0

    def now(self) -> float:
        """At most a second more than at the last call."""
        now = time.monotonic()
        self._sum += min(now - self._last, _LONGEST_GAP)
        self._last = now
        return self._sum


class _Watcher:
    """One start of a group, from its first moment to its last."""

    def __init__(
        self,
        group: Group,
        world_size: int,
        job_dir: Path,
        policy: Policy,
        stop: StopRequest,
        watch: Watch,
        stale: Mapping[int, Beat],
    ) -> None:
        self._clock = _Clock()
        self._group, self._job_dir, self._stale = group, job_dir, stale
        self._policy, self._stop, self._watch = policy, stop, watch
        self._processes = [Process(rank, self._clock.now()) for rank in range(world_size)]
        self._passed_on = 0
        self._called_slow: set[int] = set()

    def run(self, attempt: int) -> Failure | None:
        """Watch until all have ended well (None), or one has failed."""
        while True:
            self._pass_on_stop()
            self._look()
            verdicts = judge(self._processes, self._policy, self._clock.now())
            self._show()
            if all(each.health is Health.DONE for each in verdicts):
                self._show(last=True)
                return None
            if any(each.health is Health.DEAD for each in verdicts):
                return self._death(attempt)
            if hung := suspects(self._processes, verdicts):
                return self._hang(attempt, hung, {each.rank: each.why for each in verdicts})
            self._tell_stragglers(verdicts)
            time.sleep(_POLL_SECONDS)

    def _look(self) -> None:
        now = self._clock.now()
        beats = _beats(self._job_dir)
        codes = self._group.exit_codes()
        for index, process in enumerate(self._processes):
            beat = beats.get(process.rank)
            # A beat of an earlier start lies there until this one has written its own.
            if beat is not None and beat != self._stale.get(process.rank):
                process = heard(process, beat, now, self._policy)
            if process.exit_code is None and process.rank in codes:
                process = ended(process, codes[process.rank], now)
            self._processes[index] = process

    def _pass_on_stop(self) -> None:
        if self._stop.count == self._passed_on:
            return
        self._passed_on = self._stop.count
        if self._passed_on == 1:
            self._watch.note(
                f"{self._stop.name}: all processes finish their step and save; once more ends them"
            )
            self._group.signal(signal.SIGTERM)
        else:
            self._group.kill()

    def _show(self, *, last: bool = False) -> None:
        several = len(self._processes) > 1
        for rank, line in self._group.new_lines(last=last):
            self._watch.log(f"[rank {rank}] {line}" if several else line)

    def _tell_stragglers(self, verdicts: list[Verdict]) -> None:
        slow = {each.rank: each.why for each in verdicts if each.health is Health.STRAGGLER}
        for rank in slow.keys() - self._called_slow:
            self._watch.note(f"rank {rank} is slow: {slow[rank]}")
        fine = {each.rank for each in verdicts if each.health is Health.FINE}
        for rank in self._called_slow & fine:
            self._watch.note(f"rank {rank} keeps up again")
        self._called_slow = (self._called_slow | slow.keys()) - fine

    def _death(self, attempt: int) -> Failure:
        if self._stop.count:
            self._wait_for_all()
            running = []
        else:
            running = self._wait_for_last_words()
        first = first_death(self._group.deaths())
        if running and first.lost_connection:
            return self._hang(
                attempt, running, dict.fromkeys(running, f"rank {first.rank} waited for it in vain")
            )
        self._show(last=True)
        why = describe_exit(first.exit_code)
        step = self._step_of(first.rank)
        return Failure(attempt, first.rank, why, step, first.tail, exit_code=first.exit_code)

    def _wait_for_last_words(self) -> list[int]:
        """Ranks that still run a little after the first death.

        Where the dead only gave up waiting, those that have lost them too end soon; the cause does not.
        """
        begun = time.monotonic()
        while True:
            codes = self._group.exit_codes()
            running = [process.rank for process in self._processes if process.rank not in codes]
            has_cause = not first_death(self._group.deaths()).lost_connection or bool(self._group.stopped())
            if not running or time.monotonic() - begun > (_GRACE_SECONDS if has_cause else _LOST_SECONDS):
                return running
            time.sleep(_POLL_SECONDS)

    def _wait_for_all(self) -> None:
        """Each saves its part of the checkpoint. One that hangs, or lost another, is not waited for long."""
        lost_at: float | None = None
        while any(process.exit_code is None for process in self._processes):
            self._pass_on_stop()
            self._look()
            self._show()
            now = self._clock.now()
            codes = [process.exit_code for process in self._processes if process.exit_code is not None]
            if lost_at is None and any(code not in (0, _INTERRUPTED) for code in codes):
                lost_at = now
            if lost_at is not None and now - lost_at > _LOST_SECONDS:
                return
            if suspects(self._processes, judge(self._processes, self._policy, now)):
                return
            time.sleep(_POLL_SECONDS)

    def _hang(self, attempt: int, hung: list[int], whys: Mapping[int, str]) -> Failure:
        stopped = self._group.stopped()
        stacks = self._group.stacks()
        ended = self._group.exit_codes()
        silent = [each.rank for each in self._processes if each.rank not in stacks and each.rank not in ended]
        blamed = blame(hung, stopped, silent, stacks)
        rank = blamed[0]
        why = whys[rank]
        if rank in stopped:
            why += ", the process is stopped (SIGSTOP)"
        elif len(blamed) > 1:
            why += f"; the same holds for rank {', '.join(map(str, blamed[1:]))}, and each may be the cause"
        self._show(last=True)
        tail = last_lines(self._group.tail(rank))
        step = self._step_of(rank)
        return Failure(attempt, rank, why, step, tail, stacks=dict(stacks), silent=tuple(silent))

    def _step_of(self, rank: int) -> int | None:
        beat = self._processes[rank].beat
        return None if beat is None else beat.step


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
