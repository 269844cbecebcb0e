"""Kinds of layouts on more and more devices: which fit, how fast they are, and how much failures leave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hearth.parallel.planner.choose import Choice, find_choices
from hearth.parallel.planner.facts import ModelFacts
from hearth.parallel.planner.hardware import Cluster
from hearth.parallel.planner.job import Job
from hearth.parallel.planner.memory import Plan
from hearth.parallel.simulation.run import Faults, Outcome, Saves, simulate_many

# Bytes that a checkpoint has for a weight: float32 weight and two moments of AdamW.
_CHECKPOINT_BYTES = 12
# Each device copies its share to its host while a step waits (PCIe 4 x16, 80 % reached), and a node reads at
# so much when a run starts again.
_COPY_BANDWIDTH, _NODE_READS = 25e9, 5e9
# Seconds of work between checkpoints. What loses least would be a checkpoint nearly every step, as a copy to
# the host costs so little; storage would have to take in terabytes as often.
_EVERY = 1800.0
_DAYS = 30.0
_DAY = 86_400.0

KINDS = ("replicas", "shared state", "shared state, cut tensors", "pipelines")


@dataclass(frozen=True)
class Point:
    """The best layout of a kind on so many devices, and what a month of it gives."""

    num_devices: int
    choice: Choice
    outcome: Outcome

    @property
    def effective_mfu(self) -> float:
        """MFU over all of the time, failures, saves and stragglers included."""
        return self.choice.step.mfu * self.outcome.goodput


def kind_of(plan: Plan) -> str:
    """Which of `KINDS` a plan is of."""
    layout = plan.layout
    if layout.pipeline > 1:
        return KINDS[3]
    if layout.tensor * layout.context > 1:
        return KINDS[2]
    return KINDS[1] if layout.shard > 1 else KINDS[0]


def saves_of(facts: ModelFacts, cluster: Cluster) -> Saves:
    """Checkpoints every half hour, copied to the host while a step waits and written in the background."""
    return Saves(
        bytes=_CHECKPOINT_BYTES * facts.num_parameters,
        stall_bandwidth=_COPY_BANDWIDTH * cluster.num_devices,
        load_bandwidth=_NODE_READS * cluster.num_nodes,
        every=_EVERY,
    )


def study(
    facts: ModelFacts,
    job: Job,
    clusters: Iterable[Cluster],
    *,
    faults: Faults,
    seed: int = 0,
    rounds: int = 5,
) -> dict[str, list[Point]]:
    """By kind, a point for each cluster on which the kind fits; a kind that never fits has none."""
    found: dict[str, list[Point]] = {kind: [] for kind in KINDS}
    for cluster in clusters:
        best: dict[str, Choice] = {}
        for choice in find_choices(facts, job, cluster)[0]:  # the fastest first
            best.setdefault(kind_of(choice.plan), choice)
        for kind, choice in best.items():
            outcome = simulate_many(
                rounds=rounds,
                step_seconds=choice.step.seconds,
                num_steps=max(1, round(_DAYS * _DAY / choice.step.seconds)),
                num_devices=cluster.num_devices,
                faults=faults,
                saves=saves_of(facts, cluster),
                seed=seed,
            )
            found[kind].append(Point(cluster.num_devices, choice, outcome))
    return found
