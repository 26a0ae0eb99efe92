"""What scores say of operations, kinds of units and blocks, and which formats those were given: tables and charts.

`predict-scores` leaves the distributions, `bit-allocation` the formats; both are read from `decisions.json`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mpq_compiler.support import svg, terminal
from mpq_compiler.support.errors import UserError

OPERATION, UNIT, BLOCK = "operation", "unit", "block"
KINDS = {OPERATION: "operation", UNIT: "kind of unit", BLOCK: "block"}
"""What layers are grouped by, and how that is called."""


def box(values: Sequence[float]) -> list[float]:
    """Least, first quartile, median, third quartile and largest of some scores."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else 3 * ordered
    return [ordered[0], *quartiles, ordered[-1]]


def known(document: Mapping[str, Any]) -> Mapping[str, Mapping[str, Sequence[float]]]:
    """The boxes of scores that `predict-scores` left, by kind and name of the group; none where nothing was scored."""
    return next((said["boxes"] for said in document["program"].values() if "boxes" in said), {})


def explain(document: Mapping[str, Any]) -> dict[str, Any]:
    """Of each group of layers the ``box`` of its scores and how many of its layers have each of the ``formats``.

    document: `provenance.document`. UserError: nothing was scored.
    """
    boxes = known(document)
    if not boxes:
        raise UserError(
            "nothing was scored here: compile with `mpqc compile --recipe qua2sedimo`, or another pipeline with the "
            "pass 'predict-scores'"
        )
    chosen: dict[str, dict[str, Counter[str]]] = {kind: {} for kind in KINDS}
    for passes in document["layers"].values():
        said = {key: value for one in passes.values() for key, value in one.items()}
        for kind in KINDS:
            if kind in said and "format" in said:
                chosen[kind].setdefault(said[kind], Counter())[said["format"]] += 1
    return {
        "scores": {
            kind: [
                {"name": name, "box": box, "formats": dict(sorted(chosen[kind].get(name, Counter()).items()))}
                for name, box in boxes[kind].items()
            ]
            for kind in KINDS
        }
    }


def show(found: Mapping[str, Any]) -> None:
    """Prints `explain` as a table for each kind of group."""
    for kind, title in KINDS.items():
        rows = found["scores"][kind]
        formats = _formats(rows)
        terminal.table(
            f"scores by {title}, and how many of its layers have which format",
            (title, "least", "1/4", "median", "3/4", "most", *formats),
            [
                (row["name"], *(f"{v:.2f}" for v in row["box"]), *(row["formats"].get(f, "") for f in formats))
                for row in rows
            ],
            numeric=range(1, 6 + len(formats)),
        )


def charts(found: Mapping[str, Any]) -> dict[str, str]:
    """By the kind of group, the boxes of its scores and the shares of its formats, as SVG."""
    made = {}
    for kind, title in KINDS.items():
        groups = found["scores"][kind]
        formats = _formats(groups)
        rows = [svg.Row(row["name"], row["box"], [row["formats"].get(f, 0) for f in formats]) for row in groups]
        made[title] = svg.boxes(rows, f"scores by {title}", "score", formats)
    return made


def _formats(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({name for row in rows for name in row["formats"]})
