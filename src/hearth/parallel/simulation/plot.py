"""Lines over a number of devices, as one SVG file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _GAP = 420, 260, 24
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 30, 40
_COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#b83280", "#4a5568")
_AXIS, _GRID = "#4a5568", "#e2e8f0"
_LINE = 16


@dataclass(frozen=True)
class Panel:
    """A picture: lines by name, each of pairs of devices and a share between 0 and ``top``."""

    title: str
    lines: Mapping[str, Sequence[tuple[int, float]]]
    top: float = 1.0


def svg(title: str, panels: Sequence[Panel], *, columns: int = 2) -> str:
    """The panels beside and below one another, with one legend; sizes and shares are on the axes."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = columns * (_WIDTH + _GAP) + _GAP
    height = 64 + rows * (_HEIGHT + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_GAP}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    at = float(_GAP)
    for name, colour in colours.items():
        parts.append(f'<path d="M{at:.0f},42 h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{at + 24:.0f}" y="46">{escape(name)}</text>')
        at += 48 + 6.2 * len(name)
    for index, panel in enumerate(panels):
        x = _GAP + index % columns * (_WIDTH + _GAP)
        y = 60 + index // columns * (_HEIGHT + _GAP)
        parts.append(f'<g transform="translate({x},{y})">{_panel(panel, colours)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, colours: Mapping[str, str]) -> str:
    sizes = sorted({size for line in panel.lines.values() for size, _ in line})
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<text x="{_LEFT}" y="18" font-weight="bold">{escape(panel.title)}</text>']
    if not sizes:
        return "".join([*parts, f'<text x="{_LEFT}" y="60">nothing fits</text>'])
    low, high = math.log2(sizes[0]), max(math.log2(sizes[-1]), math.log2(sizes[0]) + 1)

    def across(size: int) -> float:
        return _LEFT + (math.log2(size) - low) / (high - low) * (right - _LEFT)

    def up(share: float) -> float:
        return bottom - min(share / panel.top, 1.0) * (bottom - _TOP)

    for quarter in range(5):
        share = panel.top * quarter / 4
        parts.append(f'<path d="M{_LEFT},{up(share):.1f} H{right}" stroke="{_GRID}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    parts.append(f'<path d="M{_LEFT},{_TOP} V{bottom} H{right}" fill="none" stroke="{_AXIS}"/>')
    for size in sizes[:: max(1, len(sizes) // 6)]:
        parts.append(
            f'<text x="{across(size):.1f}" y="{bottom + _LINE}" text-anchor="middle">{size:,}</text>'
        )
    for name, line in panel.lines.items():
        if not line:
            continue
        points = " ".join(f"{across(size):.1f},{up(share):.1f}" for size, share in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        for size, share in line:
            label = escape(f"{name}, {size:,} devices: {share:.1%}")
            parts.append(
                f'<circle cx="{across(size):.1f}" cy="{up(share):.1f}" r="3" fill="{colours[name]}">'
                f"<title>{label}</title></circle>"
            )
    return "".join(parts)
