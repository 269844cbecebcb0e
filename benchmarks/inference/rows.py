"""The measurements: each takes competitors and gives, by label and competitor, the values of all rounds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.competitor import Competitor, CompetitorFailed, Spec
from inference.figures import decode_rate
from inference.models import Prompts

Rows = dict[str, dict[str, list[float]]]


def progress(text: str) -> None:
    """Tell who waits, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Report:
    """What was measured and what could not be."""

    rows: dict[str, Rows] = field(default_factory=dict)  # by table
    notes: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # competitors that are not installed
    facts: dict[str, Any] = field(default_factory=dict)  # by competitor: versions, memory, load

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            progress(f"note: {text}")

    def miss(self, spec: Spec) -> bool:
        """Whether a competitor is not installed, which is noted."""
        if spec.missing is None:
            return False
        self.note(spec.missing)
        if spec.name not in self.absent:
            self.absent.append(spec.name)
        return True

    def add(self, table: str, label: str, name: str, value: float) -> None:
        """A value of a round."""
        self.rows.setdefault(table, {}).setdefault(label, {}).setdefault(name, []).append(value)


@contextlib.contextmanager
def running(
    specs: Sequence[Spec], report: Report, *, label: str, fill: list[list[int]]
) -> Iterator[list[Competitor]]:
    """Competitors, loaded one after another and asleep; those that cannot run are noted and left out.

    ``fill`` is computed once by each with a pool, so that its memory was written before anything is measured.
    """
    alive: list[Competitor] = []
    try:
        for spec in specs:
            if report.miss(spec):
                continue
            progress(f"loading {spec.name}")
            competitor = Competitor(spec)
            alive.append(competitor)  # from now on it is closed whatever happens
            try:
                competitor.load()
                if spec.peer in ("hearth", "vllm"):
                    competitor.generate(fill, 1)
            except CompetitorFailed as error:
                report.note(str(error))
                alive.remove(competitor)
                competitor.kill()
                continue
            competitor.pause()
            report.facts[f"{spec.name}, {label}"] = competitor.facts
        yield alive
    finally:
        for competitor in alive:
            competitor.close()


def in_turns(
    competitors: list[Competitor],
    measure: Callable[[Competitor], dict[str, float]],
    report: Report,
    table: str,
    *,
    rounds: int,
) -> None:
    """``measure`` gives values by label. One round warms up; who fails is noted and measured no more."""
    out: set[str] = set()
    for round_ in range(rounds + 1):
        for competitor in competitors:
            name = competitor.spec.name
            if name in out:
                continue
            try:
                with competitor.turn():
                    values = measure(competitor)
            except CompetitorFailed as error:
                report.note(str(error))
                out.add(name)
                continue
            if round_ > 0:
                for label, value in values.items():
                    report.add(table, label, name, value)


@dataclass(frozen=True)
class Load:
    """A batch of random prompts and how many tokens to generate; fewer for transformers, which is slow."""

    batch: int
    length: int
    num_tokens: int
    num_tokens_of_slow: int = 5

    def tokens_for(self, competitor: Competitor) -> int:
        if competitor.spec.peer == "transformers":
            return min(self.num_tokens, self.num_tokens_of_slow)
        return self.num_tokens


def throughput(
    competitors: list[Competitor],
    load: Load,
    prompts: Prompts,
    report: Report,
    *,
    label: str,
    decode: bool,
    rounds: int,
) -> None:
    """Decode rates of a load, or prefill rates (to the first token of all, a single one generated)."""

    def measure(competitor: Competitor) -> dict[str, float]:
        batch = prompts(load.batch, load.length)
        if decode:
            return {label: decode_rate(competitor.generate(batch, load.tokens_for(competitor)))}
        return {label: load.batch * load.length / competitor.generate(batch, 1)["first"]}

    progress(label)
    in_turns(competitors, measure, report, "tok/s", rounds=rounds)


def prefix(competitors: list[Competitor], prompts: Prompts, report: Report, length: int, rounds: int) -> None:
    """Time to the first token of a prompt that nobody saw, and of one that starts like it."""

    def measure(competitor: Competitor) -> dict[str, float]:
        common = prompts(1, length)[0]
        cold, warm = (competitor.generate([common + prompts(1, 16)[0]], 1)["first"] for _ in range(2))
        return {f"{length}-token prefix, cold": 1e3 * cold, f"{length}-token prefix, repeated": 1e3 * warm}

    progress("prefix")
    in_turns(competitors, measure, report, "ms to the first token", rounds=rounds)


def start(specs: Sequence[Spec], report: Report, rounds: int) -> None:
    """Seconds from the start of a fresh process to its first token; files and compile caches are warm."""
    for spec in specs:
        for round_ in range(rounds):
            if report.miss(spec):
                break
            progress(f"start of {spec.name}, {round_ + 1} of {rounds}")
            began = time.perf_counter()
            competitor = Competitor(spec)
            try:
                competitor.load()
                if spec.load.get("own_process"):  # loading included a first token
                    label = "start to first token, own process"
                else:
                    label = "start to first token"
                    competitor.generate([[5] * 16], 1)
            except CompetitorFailed as error:
                report.note(str(error))
                break
            else:
                report.add("seconds", label, spec.name, time.perf_counter() - began)
            finally:
                competitor.close()


def scheduling(num_requests: int, num_steps: int) -> list[float]:
    """Milliseconds of each step with this many running requests: plan, and its tables for the attention."""
    import torch

    from hearth.engine.attention.step import StepContext
    from hearth.engine.params import SamplingParams
    from hearth.engine.pool import BlockPool
    from hearth.engine.request import Request
    from hearth.engine.scheduler import Scheduler

    pool = BlockPool(num_requests * 40, 32)
    scheduler = Scheduler(pool, max_num_seqs=num_requests, max_num_batched_tokens=8192)
    context = StepContext(32, torch.device("cpu"))
    prompts = Prompts(32768, seed=0)
    for i, prompt in enumerate(prompts(num_requests, 512)):
        scheduler.add(Request(f"r{i}", 0, prompt, SamplingParams(max_tokens=num_steps + 8), num_steps + 8))
    times: list[float] = []
    while len(times) < num_steps:
        began = time.perf_counter()
        plan = scheduler.schedule()
        context.fill(plan)
        elapsed = 1e3 * (time.perf_counter() - began)
        if plan.num_tokens == num_requests:  # all prompts are computed: every row is a decode
            times.append(elapsed)
        for row in plan.rows:
            if row.samples:
                row.request.tokens.append(7)
                scheduler.settle(row.request)
    return times
