"""A long run with failures, slow processes and checkpoints, by Monte Carlo: how much of the time is work.

Failures come as a Poisson process; each loses what was done since the last checkpoint and stops everything
for a restart, which may fail again. The time of a step is that of the slowest process. The same seed gives
the same result.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hearth.parallel.simulation.formulas import best_interval, expected_slowest

HOUR = 3600.0
DAY = 24 * HOUR
# Llama Team 2024, "The Llama 3 herd of models", section 3.3.4 and table 5: 466 interruptions in 54 days on
# 16,384 GPUs, of which 419 were not planned.
LLAMA3_MTBF = 54 * DAY * 16_384 / 419


@dataclass(frozen=True)
class Faults:
    """What goes wrong. Seconds; ``device_mtbf`` is the mean time between failures of one device.

    The rate of failures is Llama 3's. The others are assumptions: a minute until a failure is noticed, four
    until all processes are there again, and steps of processes that scatter by 2 % of their mean.
    """

    device_mtbf: float = LLAMA3_MTBF
    detect_seconds: float = 60.0
    restart_seconds: float = 240.0
    deviation: float = 0.02


@dataclass(frozen=True)
class Saves:
    """How checkpoints are made. ``every`` is in seconds of work; None: as often as loses least."""

    bytes: float  # of the whole state
    stall_bandwidth: float  # bytes a second at which all processes together stand still for it
    load_bandwidth: float  # bytes a second at which all together read it again
    every: float | None = None

    @property
    def stall_seconds(self) -> float:
        """How long a step waits for a checkpoint."""
        return self.bytes / self.stall_bandwidth

    @property
    def load_seconds(self) -> float:
        """How long a restart reads."""
        return self.bytes / self.load_bandwidth


@dataclass(frozen=True)
class Outcome:
    """Where the time went; shares of it add up to 1."""

    seconds: float
    useful: float  # steps that stayed, at the speed without stragglers
    stragglers: float
    saves: float
    lost: float  # steps done again after failures
    restarts: float
    failures: int

    @property
    def goodput(self) -> float:
        """Share of the time that is work which stays."""
        return self.useful / self.seconds

    def shares(self) -> dict[str, float]:
        """Shares by name."""
        names = ("useful", "stragglers", "saves", "lost", "restarts")
        return {name: getattr(self, name) / self.seconds for name in names}


def simulate(
    *,
    step_seconds: float,
    num_steps: int,
    num_devices: int,
    faults: Faults,
    saves: Saves,
    seed: int = 0,
) -> Outcome:
    """Run ``num_steps`` steps of ``step_seconds`` (without stragglers) on so many devices.

    Work between checkpoints is drawn piece by piece: a failure in it ends the piece. A run that gets nowhere
    in a thousand times its own length is given up, and counts as it stands.
    """
    rng = random.Random(seed)
    mtbf = faults.device_mtbf / num_devices
    stretched = step_seconds * expected_slowest(num_devices, faults.deviation)
    interval = saves.every or best_interval(saves.stall_seconds, mtbf)
    steps_between = max(1, round(interval / stretched))
    restart = faults.detect_seconds + faults.restart_seconds + saves.load_seconds
    clock = useful = stalled = lost = restarting = 0.0
    failures = done = 0
    next_failure = rng.expovariate(1 / mtbf)
    limit = 1000 * num_steps * step_seconds + 100 * restart
    while done < num_steps and clock < limit:
        steps = min(steps_between, num_steps - done)
        piece = steps * stretched
        whole = piece + saves.stall_seconds
        if clock + whole <= next_failure:
            clock += whole
            stalled += saves.stall_seconds
            done += steps
            useful += steps * step_seconds
            continue
        lost += next_failure - clock
        clock = next_failure
        while True:
            failures += 1
            next_failure = clock + rng.expovariate(1 / mtbf)
            if clock + restart <= next_failure:
                break
            restarting += next_failure - clock
            clock = next_failure
            if clock >= limit:
                break
        clock += restart
        restarting += restart
    straggling = clock - useful - stalled - lost - restarting
    return Outcome(clock, useful, straggling, stalled, lost, restarting, failures)


def simulate_many(
    *,
    rounds: int,
    step_seconds: float,
    num_steps: int,
    num_devices: int,
    faults: Faults,
    saves: Saves,
    seed: int = 0,
) -> Outcome:
    """The sums of several runs, whose seeds follow one another."""
    total: Outcome | None = None
    for number in range(rounds):
        one = simulate(
            step_seconds=step_seconds,
            num_steps=num_steps,
            num_devices=num_devices,
            faults=faults,
            saves=saves,
            seed=seed * rounds + number,
        )
        total = one if total is None else _add(total, one)
    assert total is not None
    return total


def _add(left: Outcome, right: Outcome) -> Outcome:
    return replace(left, **{name: value + getattr(right, name) for name, value in vars(left).items()})
