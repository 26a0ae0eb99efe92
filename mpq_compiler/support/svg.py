"""Small charts as SVG text: boxes, and points on two logarithmic axes.

They need no scripts and no fonts. Text and axes take ``currentColor``, so a chart follows the colors of its page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, which the color-blind can tell apart."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 26, 44


@dataclass(frozen=True)
class Point:
    """A mark of a chart; ``label`` is its tooltip, ``series`` picks its color."""

    x: float
    y: float
    label: str = ""
    series: int = 0


@dataclass(frozen=True)
class Frame:
    """The plot area and its axes: data ranges, logarithmic or not."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    def across(self, value: float) -> float:
        """The x coordinate of a value, in pixels from the left."""
        return _LEFT + _share(value, self.x, self.log) * (self.width - _LEFT - _RIGHT)

    def up(self, value: float) -> float:
        """The y coordinate of a value, in pixels from the top."""
        return self.height - _BOTTOM - _share(value, self.y, self.log) * (self.height - _TOP - _BOTTOM)


def _share(value: float, ends: tuple[float, float], log: bool) -> float:
    """Where a value lies between the ends of an axis, 0 to 1."""
    low, high = ends
    if log:
        value, low, high = (math.log10(max(v, 1e-300)) for v in (value, low, high))
    return (value - low) / (high - low) if high > low else 0.5


@dataclass(frozen=True)
class Row:
    """A named distribution, and how its members are divided among the parts of the legend."""

    name: str
    box: Sequence[float]
    """Least, first quartile, median, third quartile, largest."""
    parts: Sequence[int]
    """How many members belong to each part of the legend."""


def boxes(rows: Sequence[Row], title: str, unit: str, legend: Sequence[str] = (), width: int = 900) -> str:
    """A box plot: one box a row on a common axis, and beside it a bar with the shares of its parts."""
    names, bar, thick = 260, 150, 18
    frame = Frame(width, _TOP + _BOTTOM + thick * len(rows), (0, 1), (0, 1))
    low, high = min((row.box[0] for row in rows), default=0.0), max((row.box[-1] for row in rows), default=1.0)

    def at(value: float) -> float:
        return names + _share(value, (low, high), False) * (width - names - bar - 3 * _RIGHT)

    marks = [_text(names, _TOP - 10, f"{unit} {low:.3g}", "start"), _text(at(high), _TOP - 10, f"{high:.3g}", "end")]
    for index, row in enumerate(rows):
        middle = _TOP + thick * (index + 0.5)
        ends = [at(value) for value in row.box]
        tip = _tip(f"{row.name}: {', '.join(f'{value:.3g}' for value in row.box)}")
        marks += [_text(names - 8, middle + 4, row.name, "end"), _line(ends[0], middle, ends[-1], middle, 0.6)]
        marks.append(
            f'<rect x="{ends[1]:.1f}" y="{middle - 6:.1f}" width="{max(ends[3] - ends[1], 0.5):.1f}" height="12" '
            f'fill="{PALETTE[-1]}">{tip}</rect>'
        )
        marks.append(_line(ends[2], middle - 6, ends[2], middle + 6, 1))
        x, total = float(width - bar - _RIGHT), sum(row.parts)
        for part, count in enumerate(row.parts):
            wide = bar * count / total if total else 0.0
            tip = _tip(f"{row.name}: {count} of {total} {legend[part]}")
            at_bar = f'x="{x:.1f}" y="{middle - 6:.1f}" width="{wide:.1f}" height="12"'
            marks.append(f'<rect {at_bar} fill="{_color(part)}">{tip}</rect>')
            x += wide
    return _drawn(frame, title, [*marks, *_legend(frame, legend)])


def log_log(
    points: Sequence[Point], roofs: Mapping[str, Sequence[tuple[float, float]]], title: str, axes: tuple[str, str],
    legend: Sequence[str] = (), width: int = 900, height: int = 480,
) -> str:  # fmt: skip
    """A scatter plot on two logarithmic axes, with roofs: polylines that are named at their ends."""
    xs = [p.x for p in points] + [x for roof in roofs.values() for x, _ in roof]
    ys = [p.y for p in points] + [y for roof in roofs.values() for _, y in roof]
    frame = Frame(width, height, _decades(xs), _decades(ys), log=True)
    marks = []
    for at in _powers(frame.x):
        x = frame.across(at)
        marks += [_line(x, _TOP, x, height - _BOTTOM, 0.15), _text(x, height - _BOTTOM + 14, f"{at:g}", "middle")]
    for at in _powers(frame.y):
        y = frame.up(at)
        marks += [_line(_LEFT, y, width - _RIGHT, y, 0.15), _text(_LEFT - 6, y + 4, f"{at:g}", "end")]
    for name, roof in roofs.items():
        marks.append(_text(frame.across(roof[-1][0]), frame.up(roof[-1][1]) - 6, name, "end"))
        path = " ".join(f"{frame.across(x):.1f},{frame.up(y):.1f}" for x, y in roof)
        marks.append(f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="1.5"/>')
    marks += [_dot(frame, p, p.series, 4) for p in points]
    marks.append(_text((_LEFT + width - _RIGHT) / 2, height - 8, axes[0], "middle"))
    marks.append(_text(_LEFT, _TOP - 10, axes[1], "middle"))
    return _drawn(frame, title, [*marks, *_legend(frame, legend)])


def _decades(values: Sequence[float]) -> tuple[float, float]:
    known = [v for v in values if v > 0] or [1.0]
    return 10.0 ** math.floor(math.log10(min(known))), 10.0 ** math.ceil(math.log10(max(known) * 1.001))


def _powers(ends: tuple[float, float]) -> list[float]:
    first, last = (round(math.log10(end)) for end in ends)
    return [10.0**power for power in range(first, last + 1)]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    edge = 0.08 * (high - low) or 1.0
    return low - edge, high + edge


def _grid(frame: Frame, unit: str) -> Iterable[str]:
    low, high = frame.y
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(m for m in (5, 2, 1) if (high - low) / (step * m) >= 3 or m == 1)
    value = math.ceil(low / step) * step
    while value <= high + 1e-9 * step:
        yield _line(_LEFT, frame.up(value), frame.width - _RIGHT, frame.up(value), 0.15)
        yield _text(_LEFT - 6, frame.up(value) + 4, f"{value:.6g}", "end")
        value += step
    yield _text(_LEFT - 6, _TOP - 8, unit, "end")


def _legend(frame: Frame, names: Sequence[str]) -> Iterable[str]:
    x = float(_LEFT)
    for index, name in enumerate(names):
        yield f'<rect x="{x:.0f}" y="{frame.height - 14}" width="10" height="10" fill="{_color(index)}"/>'
        yield _text(x + 14, frame.height - 5, name, "start")
        x += 26 + 7 * len(name)


def _color(series: int) -> str:
    return PALETTE[series % len(PALETTE)]


def _tip(label: str) -> str:
    return f"<title>{escape(label)}</title>" if label else ""


def _dot(frame: Frame, point: Point, series: int, radius: float = 3) -> str:
    at = f'cx="{frame.across(point.x):.1f}" cy="{frame.up(point.y):.1f}"'
    return f'<circle {at} r="{radius}" fill="{_color(series)}" fill-opacity="0.85">{_tip(point.label)}</circle>'


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="currentColor" stroke-opacity="{opacity}"/>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 11) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="currentColor">{escape(text)}</text>'


def _drawn(frame: Frame, title: str, marks: Iterable[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        'font-family="system-ui, sans-serif" style="max-width:100%">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", *marks, "</svg>"]) + "\n"
