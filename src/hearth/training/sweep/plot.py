"""A picture of a sweep as one SVG file that needs nothing else: the course, and the metric over each key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from hearth.config.sweep import ParameterSection, SweepSection
from hearth.training.sweep.study import Trial

_WIDTH, _HEIGHT, _GAP = 360, 240, 24
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 30, 40
_BLUE, _ORANGE, _GREY = "#2b6cb0", "#dd6b20", "#a0aec0"


class _Axis:
    """Maps values to a stretch of pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False) -> None:
        self._log = log
        found = [self._of(value) for value in values]
        low, high = min(found), max(found)
        pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        self._low, self._high, self._start, self._end = low - pad, high + pad, start, end

    def _of(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def at(self, value: float) -> float:
        """Pixel of a value."""
        share = (self._of(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Three values: near both ends and in the middle."""
        inner = [self._low + (self._high - self._low) * share for share in (0.05, 0.5, 0.95)]
        return [10**value if self._log else value for value in inner]


class _Categories:
    """Evenly spaced names."""

    def __init__(self, names: Sequence[str], start: float, end: float) -> None:
        self._names, self._start, self._end = list(names), start, end

    def at(self, name: str) -> float:
        """Pixel of a name."""
        share = (self._names.index(name) + 0.5) / len(self._names)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[str]:
        """All names."""
        return self._names


def sweep_svg(name: str, section: SweepSection, trials: Sequence[Trial]) -> str:
    """The picture. Trials without a value are left out; pruned ones are grey."""
    shown = [trial for trial in trials if trial.value is not None]
    panels = [_course(section, shown)]
    panels += [_over_key(key, parameter, shown) for key, parameter in section.parameters.items()]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = columns * (_WIDTH + _GAP) + _GAP
    height = rows * (_HEIGHT + _GAP) + 2 * _GAP + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_GAP}" y="24" font-size="15" font-weight="bold">{escape(name)}: '
        f"{escape(section.metric)} ({section.direction}), {len(trials)} trials</text>",
    ]
    for index, panel in enumerate(panels):
        x = _GAP + index % columns * (_WIDTH + _GAP)
        y = 40 + index // columns * (_HEIGHT + _GAP)
        parts.append(f'<g transform="translate({x},{y})">{panel}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _course(section: SweepSection, trials: Sequence[Trial]) -> str:
    if not trials:
        return _frame("no trial has a value", [], [])
    x = _Axis([trial.number for trial in trials], _LEFT, _WIDTH - _RIGHT)
    y = _Axis([trial.value or 0.0 for trial in trials], _HEIGHT - _BOTTOM, _TOP)
    best, points = None, []
    better = min if section.direction == "minimize" else max
    for trial in trials:
        if trial.state == "finished" and trial.value is not None:
            best = trial.value if best is None else better(best, trial.value)
        if best is not None:
            points.append(f"{x.at(trial.number):.1f},{y.at(best):.1f}")
    line = f'<polyline points="{" ".join(points)}" fill="none" stroke="{_ORANGE}" stroke-width="1.5"/>'
    dots = [_dot(x.at(trial.number), y.at(trial.value or 0.0), trial) for trial in trials]
    numbers = sorted({trials[0].number, trials[-1].number})
    return _frame(
        "by trial; the line is the best so far",
        [(x.at(number), str(number)) for number in numbers],
        [(y.at(tick), f"{tick:.4g}") for tick in y.ticks()],
        [line, *dots],
    )


def _over_key(key: str, parameter: ParameterSection, trials: Sequence[Trial]) -> str:
    values = [(trial, trial.params[key]) for trial in trials if key in trial.params]
    if not values:
        return _frame(key, [], [])
    y = _Axis([trial.value or 0.0 for trial in trials], _HEIGHT - _BOTTOM, _TOP)
    ticks = [(y.at(tick), f"{tick:.4g}") for tick in y.ticks()]
    if parameter.kind == "choice":
        names = _Categories([json.dumps(value) for value in parameter.range() or ()], _LEFT, _WIDTH - _RIGHT)
        dots = [_dot(names.at(json.dumps(value)), y.at(trial.value or 0.0), trial) for trial, value in values]
        return _frame(key, [(names.at(name), name.strip('"')) for name in names.ticks()], ticks, dots)
    x = _Axis([value for _, value in values], _LEFT, _WIDTH - _RIGHT, log=parameter.kind == "log")
    dots = [_dot(x.at(value), y.at(trial.value or 0.0), trial) for trial, value in values]
    return _frame(key, [(x.at(tick), f"{tick:.3g}") for tick in x.ticks()], ticks, dots)


def _dot(x: float, y: float, trial: Trial) -> str:
    colour = _BLUE if trial.state == "finished" else _GREY
    label = f"trial {trial.number}, {trial.state}: {trial.value:.6g}; {_spelled(trial.params)}"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}" fill-opacity="0.8">'
        f"<title>{escape(label)}</title></circle>"
    )


def _spelled(params: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in params.items()
    )


def _frame(
    title: str,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    content: Sequence[str] = (),
) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
        f'<path d="M{_LEFT},{_TOP} V{bottom} H{right}" fill="none" stroke="#4a5568"/>',
    ]
    for x, label in x_ticks:
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(label)}</text>')
    for y, label in y_ticks:
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<path d="M{_LEFT},{y:.1f} H{right}" stroke="#e2e8f0"/>')
    return "".join([*parts, *content])
