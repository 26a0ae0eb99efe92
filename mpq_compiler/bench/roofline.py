"""Benchmark results as a roofline plot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpq_compiler.support import svg
from mpq_compiler.support.svg import Point


def roofline(found: Mapping[str, Any]) -> str:
    """The kernels that multiply under the roofs of this machine, as SVG: GMAC/s over MACs a byte of operands."""
    rows = [row for row in found["kernels"] if row["macs"] and row["bytes"]]
    families = sorted({row["template"] for row in rows})
    points = [
        Point(
            row["macs"] / row["bytes"],
            row["gmacs"],
            f"{row['layer'] or row['node']}: {row['ms']:.4f} ms, {row['gmacs']:.1f} GMAC/s",
            families.index(row["template"]),
        )
        for row in rows
    ]
    peak = found["peak"]
    xs = [p.x for p in points] or [1.0]
    roofs = {}
    for name, top in (("8-bit integers", peak["gmacs"]), ("f32", peak["float_gmacs"])):
        if top:
            knee = top / peak["gbytes"]
            first, last = min([*xs, knee]) / 2, max([*xs, knee]) * 2
            roofs[name] = [(first, first * peak["gbytes"]), (knee, top), (last, top)]
    return svg.log_log(points, roofs, "roofline", ("multiply-accumulates for each byte", "GMAC/s"), families)
