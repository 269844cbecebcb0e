"""How fast training is, and where the time of a step goes."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from hearth.errors import ConfigError
from hearth.training.callbacks import Callback

if TYPE_CHECKING:
    from hearth.training.trainer import Trainer
    from hearth.workspace import Run

PHASES = ("data", "forward", "backward", "optimizer", "other")
# Between steps, but no part of any: evaluations and checkpoints come as often as the recipe says.
_APART = ("evaluation", "checkpoint")


class _Timer(Protocol):
    def mark(self) -> Any: ...

    def seconds(self, first: Any, second: Any) -> float | None: ...


class _HostTimer:
    """Time as the processor sees it."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, second: float) -> float | None:
        return second - first


class _CudaTimer:
    """Time as the GPU sees it: launches return early, so the host's clock would blame the next wait."""

    def mark(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, first: Any, second: Any) -> float | None:
        return first.elapsed_time(second) / 1000.0 if second.query() else None


class StepClock:
    """Divides time into phases. ``phase`` ends one and begins the next; ``step_done`` closes a step."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._timer: _Timer = _CudaTimer() if device is not None and device.type == "cuda" else _HostTimer()
        self._marks: list[tuple[str, Any]] = []
        self._open_steps: list[tuple[list[tuple[str, Any]], Any, int]] = []
        self.seconds = {name: array("d") for name in PHASES}  # of each step
        self.num_tokens = array("q")

    def phase(self, name: str) -> None:
        """From now on time counts for ``name``."""
        if not self._marks or self._marks[-1][0] != name:
            self._marks.append((name, self._timer.mark()))

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Time inside counts for no step; ``name`` is evaluation or checkpoint."""
        assert name in _APART, name
        before = self._marks[-1][0] if self._marks else "other"
        self.phase(name)
        try:
            yield
        finally:
            self.phase(before)

    def step_done(self, num_tokens: int) -> None:
        """A step ends here; what follows belongs to the next one."""
        end = self._timer.mark()
        self._open_steps.append((self._marks, end, num_tokens))
        self._marks = [("other", end)]
        while self._open_steps and self._resolve(*self._open_steps[0]):
            del self._open_steps[0]

    def _resolve(self, marks: list[tuple[str, Any]], end: Any, num_tokens: int) -> bool:
        """Turn marks into seconds; False while the GPU has not come so far."""
        found = dict.fromkeys((*PHASES, *_APART), 0.0)
        ends = [mark for _, mark in marks[1:]] + [end]
        for (name, first), second in zip(marks, ends, strict=True):
            seconds = self._timer.seconds(first, second)
            if seconds is None:
                return False
            found[name] += seconds
        for name in PHASES:
            self.seconds[name].append(found[name])
        self.num_tokens.append(num_tokens)
        return True


def performance_report(
    seconds: Mapping[str, Sequence[float]],
    num_tokens: Sequence[int],
    *,
    flops_per_token: float,
    peak_flops: float,
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """Figures over the steps of this process; the first, which warms up, is left out where there are more.

    seconds: for each phase, one number a step. Loop overhead is all that is neither model nor optimizer, with
    rollouts of reinforcement learning, which count as data.
    """
    skip = 1 if len(num_tokens) > 1 else 0
    phases = {name: np.asarray(values, dtype=float)[skip:] for name, values in seconds.items()}
    steps = sum(phases.values(), start=np.zeros(len(num_tokens) - skip))
    total = float(steps.sum())
    if len(num_tokens) == 0 or total == 0.0:
        return {"num_steps": 0}
    tokens_per_second = float(sum(num_tokens[skip:])) / total
    shares = {name: float(values.sum()) / total for name, values in phases.items()}
    return {
        "num_steps": len(steps),
        "step_seconds_p50": float(np.percentile(steps, 50)),
        "step_seconds_p95": float(np.percentile(steps, 95)),
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * flops_per_token / peak_flops,
        "mfu_formula": f"tokens/s * (6 P + 6 L H D T) / peak = {tokens_per_second:.6g} * "
        f"{flops_per_token:.6g} / {peak_flops:.6g}; P weights that multiply a token, L layers, H heads of "
        "size D, T tokens in a row, causal half of attention, nothing for recomputation",
        "peak_memory_bytes": peak_memory_bytes,
        "shares": shares,
        "loop_overhead": shares["data"] + shares["other"],
    }


class PerformanceCallback(Callback):
    """Leaves ``performance.json`` in the run, and the same in its summary; every run has one."""

    def report(self, trainer: Trainer) -> dict[str, Any]:
        """The figures so far."""
        from hearth.training.session import peak_memory_bytes

        return performance_report(
            trainer.clock.seconds,
            trainer.clock.num_tokens,
            flops_per_token=trainer.facts.flops_per_token,
            peak_flops=trainer.peak_flops(),
            peak_memory_bytes=peak_memory_bytes(trainer.device),
        )

    def on_end(self, trainer: Trainer, run: Run, status: str) -> None:  # noqa: ARG002 - whatever the end
        """Write the figures."""
        report = self.report(trainer)
        if report["num_steps"]:
            (run.dir / "performance.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            run.update_summary({"performance": report})


class ProfilerCallback(Callback):
    """Profiles the steps ``first`` to ``last`` with torch's profiler into a Chrome trace in the run's folder.

    A profiled step is slower. Raises ConfigError for a window that is upside down or never comes.
    """

    def __init__(self, first: int, last: int, *, total_steps: int) -> None:
        if not 1 <= first <= last:
            raise ConfigError(
                f"train.profile_steps [{first}, {last}] is no window", fix="give the first and the last step"
            )
        if first > total_steps:
            raise ConfigError(
                f"train.profile_steps [{first}, {last}] never comes: the run has {total_steps} steps",
                fix="choose earlier steps",
            )
        self.first, self.last = first, last
        self._profiler: Any = None

    def on_start(self, trainer: Trainer, run: Run) -> None:
        """Begin at once where the window includes the next step."""
        self._folder = run.dir / "profile"
        self._begin_before(trainer, trainer.state.step + 1)

    def on_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        """End after the last step of the window, or begin before the first."""
        if self._profiler is not None and step >= self.last:
            self._write(trainer, step)
        elif self._profiler is None:
            self._begin_before(trainer, step + 1)

    def on_end(self, trainer: Trainer, run: Run, status: str) -> None:  # noqa: ARG002 - whatever the end
        """A run that ends inside the window leaves what there is."""
        if self._profiler is not None:
            self._write(trainer, trainer.state.step)

    def _begin_before(self, trainer: Trainer, step: int) -> None:
        if not self.first <= step <= self.last:
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if trainer.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._began = step
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _write(self, trainer: Trainer, step: int) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(exist_ok=True)
        path: Path = self._folder / f"steps-{self._began}-{max(step, self._began)}.json"
        profiler.export_chrome_trace(str(path))
        if trainer.tracking is not None:
            trainer.tracking.artifact("trace", path, step=step)
