"""Reports predicted scores by operation, kind of unit and block, with the formats that these got: tables and charts.

`predict-scores` leaves the distributions and `bit-allocation` the formats; both are read from `decisions.json`.
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
"""The ways to group layers, and their titles."""


def box(values: Sequence[float]) -> list[float]:
    """The five-number summary of scores: least, first quartile, median, third quartile, largest."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else 3 * ordered
    return [ordered[0], *quartiles, ordered[-1]]


def known(document: Mapping[str, Any]) -> Mapping[str, Mapping[str, Sequence[float]]]:
    """The summaries of scores that `predict-scores` left, by kind and name of the group; empty without scores."""
    return next((said["boxes"] for said in document["program"].values() if "boxes" in said), {})


def explain(document: Mapping[str, Any]) -> dict[str, Any]:
    """Collects, for each group of layers, the ``box`` of its scores and the number of its layers in each format.

    document: the decisions (`provenance.document`).

    Raises:
        UserError: nothing was scored.
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
    """Prints the result of `explain`, a table for each kind of group."""
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
    """Box plots of the scores with the shares of the formats, as SVG, by the kind of group."""
    made = {}
    for kind, title in KINDS.items():
        groups = found["scores"][kind]
        formats = _formats(groups)
        rows = [svg.Row(row["name"], row["box"], [row["formats"].get(f, 0) for f in formats]) for row in groups]
        made[title] = svg.boxes(rows, f"scores by {title}", "score", formats)
    return made


def _formats(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({name for row in rows for name in row["formats"]})
