"""Allocations by network orthogonality and by measured noise, beside each other, without training.

    python -m benchmarks.orthogonality [--json FILE] [--docs FILE]

All passes but the objective are those of the default recipe. Images are drawn in 10 steps from three seeds against the
float model's. --docs writes the table between the marks of docs/recipes/orthogonality.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import documents, plans
from mpq_compiler.ir import interpreter

MODEL = "fashion-unet"
STATISTICS = frozenset({"range", "values", "moments", "gram", "gptq"})
FRONT = "trace,layout,equalize{{activations={0}}},calibrate,time-groups{{bits={0}}},time-gains{{activations={0}}}"
BACK = "insert-fake-quant,residual-branch,round-weights{method=gptq}"
INTEGERS = "int2/int3/int4/int8"
FORMATS = "km2/int2/int3/int2+b/int4/int3+b/int8"
ALL = "2/3/4/5/6/7/8"
SETTINGS = (
    (2.24, 8, "int2/int3", "8", "8"),
    (3.0, 8, "int2/int3/int4", "8", "8"),
    (4.28, 4, "int3/int4", ALL, "3/4/5"),
)
"""True bits, average bits of activations, formats near these bits, and the widths of activations, all and near."""


def plans_of(near: str, widths: str, near_widths: str) -> dict[str, tuple[str, str]]:
    """Objective and measuring pass of each plan."""
    found = {
        "noise, the recipe's formats": ("noise", f"sensitivity{{formats={FORMATS},activations={widths}}}"),
        "noise, integers": ("noise", f"sensitivity{{formats={INTEGERS},activations={widths}}}"),
    }
    for beta in (1, 10, 100):
        asked = f"formats={INTEGERS},activations={widths},beta={beta}"
        found[f"orthogonality, beta {beta}"] = ("orthogonality", f"orthogonality{{{asked}}}")
    asked = f"formats={near},activations={near_widths}"
    return found | {"orthogonality, widths near the budget": ("orthogonality", f"orthogonality{{{asked}}}")}


RESULTS = Path(__file__).parent / "results" / "orthogonality.json"


def rows(images: int) -> Iterator[dict[str, Any]]:
    for bits, activations, *choices in SETTINGS:
        judge = plans.Judge(MODEL, STATISTICS, FRONT.format(activations), images)
        for name, (objective, measure) in plans_of(*choices).items():
            measured = judge.passed(measure, judge.floats)
            budgets = f"weights={bits},activations={activations},objective={objective}"
            plan = judge.passed(f"bit-allocation{{{budgets}}}", measured)
            found = {"plan": name, "bits": bits, "activations": activations}
            found |= judge.judged(plan, judge.passed(BACK, plan))
            print(f"{bits} bits, activations of {activations}, {name}: {plans.decibels(found)}", flush=True)
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="write the table into this file")
    parser.add_argument("--images", type=int, default=64, help="from each seed (64)")
    options = parser.parse_args()
    with interpreter.single_threaded():
        found = plans.written(rows(options.images), options.json, model=MODEL, images=options.images)
    if options.docs:
        columns = ("bits of activations", "plan", "true bits", "output, dB", "images, dB (least .. most)")
        lines = [[str(row["activations"]), row["plan"], *plans.columns(row)] for row in found]
        documents.insert(options.docs, "orthogonality", documents.table(columns, lines))


if __name__ == "__main__":
    main()
