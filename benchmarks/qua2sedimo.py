"""Weights by scores of a graph neural network, beside uniform ones and an integer program on measured sensitivities.

    python -m benchmarks.qua2sedimo [--json FILE] [--docs FILE]

All rows choose among the recipe's formats, round codes to the nearest levels and have 8-bit activations. *Operations*
are the recipe: each layer takes the format of its largest score less a price of its bytes; *program* is an integer
program on these scores. *Units* are attentions, feed-forward networks and residual blocks scored as wholes; *table* is
the integer program on the noise that was measured one layer at a time.
The SQNR is that of the output, teacher-forced on 64 held-out inputs; images are drawn in 10 steps from three seeds,
their ratio is of the float model's latents to the error. --docs docs/recipes/qua2sedimo.md writes the table between its
marks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import documents, plans
from mpq_compiler.ir import interpreter, provenance
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline import recipes
from mpq_compiler.support import terminal

MODEL = "fashion-unet"
RECIPE = recipes.load("qua2sedimo")
FORMATS = RECIPE.options["predict-scores"]["formats"]
UNIFORM = ("int4", "km4")
BITS = (3.4, 3.7, 4.0)
PLANS = {
    "operations": ("operation", "scores"),
    "operations, program": ("operation", "scores-program"),
    "units": ("block", "scores"),
    "table": (None, "noise"),
}
"""Level of the scores and objective, by the name of the plan."""
RESULTS = Path(__file__).parent / "results" / "qua2sedimo.json"


class Bench(plans.Judge):
    def __init__(self, images: int) -> None:
        front, statistics = "trace,layout,split-shortcut,calibrate,time-groups", {"range", "values", "moments", "gram"}
        super().__init__(MODEL, frozenset(statistics), front, images, terminal.progress)
        self.measured: dict[str | None, Program] = {}

    def known(self, level: str | None) -> Program:
        """The program with scores of that level, or with the table."""
        if level not in self.measured:
            names = f"formats={'/'.join(FORMATS)}"
            step = f"sensitivity{{{names}}}" if level is None else f"predict-scores{{{names},level={level}}}"
            self.measured[level] = self.passed(step, self.floats)
        return self.measured[level]

    def plan(self, name: str, bits: float | None) -> Program:
        if bits is None:
            return self.passed(f"bit-allocation{{uniform={name}}}", self.floats)
        level, objective = PLANS[name]
        return self.passed(f"bit-allocation{{weights={bits},objective={objective}}}", self.known(level))

    def row(self, name: str, bits: float | None) -> dict[str, Any]:
        plan = self.plan(name, bits)
        program = self.passed("insert-fake-quant,round-weights", plan)
        found = {
            "plan": name,
            "budget": bits,
            **self.judged(plan, program),
            "formats": {n: sum(w.format == n for w in plan.weights.values()) for n in FORMATS},
        }
        print(f"{name:20} {found['true_bits']:.2f} bits: {plans.decibels(found)}", flush=True)
        return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    headers = ("plan", "true bits", "output, dB", "images, dB (least .. most)", "layers in each format")
    lines = []
    for row in rows:
        name = f"uniform `{row['plan']}`" if row["budget"] is None else row["plan"]
        used = ", ".join(f"{count} `{name}`" for name, count in row["formats"].items() if count)
        lines.append([name, *plans.columns(row), used])
    return documents.table(headers, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="write the table into this file")
    parser.add_argument("--images", type=int, default=32, help="from each seed (32)")
    options = parser.parse_args()
    cells: list[tuple[str, float | None]] = [(name, None) for name in UNIFORM]
    cells += [(name, bits) for bits in BITS for name in PLANS]
    with interpreter.single_threaded():
        bench = Bench(options.images)
        said = bench.known("operation").facts[provenance.DECISIONS][provenance.PROGRAM]["predict-scores"]
        learned = {key: said[key] for key in ("correlations", "hops", "sqnr_db")}
        about = {"model": MODEL, "images": options.images, **learned}
        rows = plans.written((bench.row(*cell) for cell in cells), options.json, **about)
    if options.docs:
        documents.insert(options.docs, "qua2sedimo", table(rows))


if __name__ == "__main__":
    main()
