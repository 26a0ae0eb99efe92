"""Line charts for the documentation, as SVG: a color and a mark for each series, and its name beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpq_compiler.support import svg

MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", "M-4 -4h8v8h-8z", "M0 -5l5 9h-10z", "M0 -5l5 5l-5 5l-5 -5z",
    "M0 5l5 -9h-10z",
)  # fmt: skip
"""Circle, square, triangle, diamond and the triangle upside down, as paths around zero."""
COLORS = (
    "#882255", "#88ccee", "#332288", "#117733", "#ddaa33", "#cc6677", "#44aa99", "#aa4499", "#777777", "#999933",
)  # fmt: skip
"""Paul Tol's muted scheme."""
Series = tuple[int, str, Sequence[tuple[float, float]]]
"""A number, which decides on color and mark, a name, and points."""


@dataclass(frozen=True)
class Axis:
    """An axis: what it spans, where it has rules, what it is, and the unit of its values."""

    span: tuple[float, float]
    rules: Sequence[float]
    title: str
    unit: str


def decibels(low: int, high: int, title: str) -> Axis:
    """An axis of decibels, with a rule at every fifth."""
    return Axis((low, high), range(low, high + 1, 5), title, "dB")


def lines(series: Sequence[Series], title: str, x: Axis, y: Axis, bold: str = "") -> str:
    """Lines through the points of each series, the one that is bold thicker."""
    frame = svg.Frame(720, 440, x.span, y.span)
    left, right, bottom, top = (*map(frame.across, x.span), *map(frame.up, y.span))
    marks = ['<rect width="100%" height="100%" fill="white"/>', _words(left, 16, title, "start")]
    for value in x.rules:
        marks += [_rule(frame.across(value), top, frame.across(value), bottom)]
        marks += [_words(frame.across(value), bottom + 16, f"{value:g}")]
    for value in y.rules:
        marks += [_rule(left, frame.up(value), right, frame.up(value))]
        marks += [_words(left - 8, frame.up(value) + 4, f"{value:g}", "end")]
    marks.append(_words((left + right) / 2, bottom + 36, x.title))
    marks.append(f'<g transform="translate(18 {(top + bottom) / 2:.0f}) rotate(-90)">{_words(0, 0, y.title)}</g>')
    for place, (number, name, points) in enumerate(series):
        color, mark = COLORS[number % len(COLORS)], MARKS[number % len(MARKS)]
        path = " ".join(f"{frame.across(a):.1f},{frame.up(b):.1f}" for a, b in sorted(points))
        width = 2.5 if name == bold else 1.5
        marks.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>')
        key = (right + 20, top + 12 + 20 * place)
        tips = [f"{name}: {b:.2f} {y.unit} at {a:.2f} {x.unit}" for a, b in sorted(points)]
        spots = [(frame.across(a), frame.up(b), tip) for (a, b), tip in zip(sorted(points), tips, strict=True)]
        for across, up, tip in [*spots, (*key, name)]:
            at = f'transform="translate({across:.1f} {up:.1f})"'
            marks.append(f'<path d="{mark}" {at} fill="{color}"><title>{tip}</title></path>')
        marks.append(_words(key[0] + 12, key[1] + 4, name, "start"))
    box = 'viewBox="0 0 840 440" role="img" font-family="system-ui, sans-serif"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
    return "\n".join([head, f"<title>{title}</title>", *marks, "</svg>"]) + "\n"


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _words(x: float, y: float, text: object, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="13">{text}</text>'
