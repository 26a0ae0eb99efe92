"""Small floats against integers in all layers of the bundled denoisers: weights, activations, ways of rounding.

    python -m benchmarks.small_floats [--models NAME ...] [--docs FILE]

Each model is calibrated once as by default. Judged are the teacher-forced SQNR of the simulated program on the 64
held-out inputs that `mpqc compile` judges by, and images from the same noise, of three seeds (`benchmarks.plans`).
--docs writes the tables between the marks of docs/recipes/fpq.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import documents, plans
from benchmarks.quality_cells import MODELS
from mpq_compiler.formats import activation
from mpq_compiler.ir import interpreter, ops
from mpq_compiler.quantization.fitting import FitCache
from mpq_compiler.quantization.statistics import GRAM, RANGE, VALUES
from mpq_compiler.support import terminal

FRONT = "trace,layout,calibrate,time-groups"
PLAN, BACK = "bit-allocation{{uniform={},{}}}", "insert-fake-quant,round-weights{{method={}}}"
FLOAT = "activation_format=float"
E4M3 = "only E4M3"
"""Behind the options: activations have that encoding and no other."""
EIGHT = (
    ("int8", "activations=8", "INT8", "u8"),
    ("fp8", f"{FLOAT},activations=8", "FP8, encodings searched", "FP8, encodings searched"),
    ("fp8e4", f"{FLOAT},activations=8", "E4M3", "FP8, encodings searched"),
    ("fp8e4", f"{FLOAT},activations=8,{E4M3}", "E4M3", "E4M3"),
    ("fp8", "activations=8", "FP8, encodings searched", "float"),
    ("fp4", f"{FLOAT},activations=8", "FP4", "FP8, encodings searched"),
    ("fp4", f"{FLOAT},activations=4", "FP4", "FP4"),
    ("int4", "activations=8", "INT4", "u8"),
    ("int4", "activations=4", "INT4", "u4"),
)
"""Weights, options of bit-allocation, and what to call both; rounded to nearest."""
FOUR = ("int4t", "fp4t", "int4", "fp4")
METHODS = ("nearest", "learned", "gptq")
RESULTS = Path(__file__).parent / "results" / "small_floats.json"


class Bench(plans.Judge):
    def __init__(self, model: str, images: int) -> None:
        super().__init__(model, frozenset({RANGE, VALUES, GRAM}), FRONT, images, terminal.progress)
        self.name = model

    def row(self, weights: str, options: str, method: str) -> dict[str, Any]:
        exponents, session = activation.exponents, self.session
        if options.endswith(E4M3):  # fits of other rows have other encodings
            exponents, session = lambda bits: (4,), replace(session, fits=FitCache())
        begin = time.process_time()
        with mock.patch.object(activation, "exponents", exponents), mock.patch.object(self, "session", session):
            plan = self.passed(PLAN.format(weights, options.removesuffix(f",{E4M3}")), self.floats)
            program = self.passed(BACK.format(method), plan)
        seconds = time.process_time() - begin
        kinds = Counter(plan.kind for plan in program.activations.values())
        encodings = Counter(f"e{n.args[3]}" for n in program.graph.nodes if n.target is ops.dequantize_float8)
        found = {"model": self.name, "weights": weights, "options": options, "method": method, "seconds": seconds}
        found |= {"activations": dict(kinds), "encodings": dict(encodings), **self.judged(plan, program)}
        print(f"{self.name} {weights:6} {options:36} {method:8} {plans.decibels(found)}  {seconds:.0f} s", flush=True)
        return found


def tables(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The tables by their marks: of each model the output's SQNR and, behind a stroke, that of images."""
    known = {(r["model"], r["weights"], r["options"], r["method"]): r for r in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))

    def both(model: str, weights: str, how: str, method: str) -> str:
        row = known[model, weights, how, method]
        return f"{row['output_db']:.1f} / {statistics.mean(row['image_db']):.1f}"

    eight = [
        [first, second, f"{known[models[0], weights, how, 'nearest']['true_bits']:.2f}"]
        + [both(model, weights, how, "nearest") for model in models]
        for weights, how, first, second in EIGHT
    ]
    four = [
        [model, f"`{weights}`", *(both(model, weights, "activations=8", method) for method in METHODS)]
        for model in models
        for weights in FOUR
    ]
    return {
        "activations": documents.table(("weights", "activations", "true bits", *models), eight),
        "rounding": documents.table(("model", "weights", "nearest", "learned", "GPTQ"), four),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--images", type=int, default=32, help="from each seed (32)")
    parser.add_argument("--docs", type=Path, help="write the tables into this file")
    options = parser.parse_args()
    wanted = [(weights, how, "nearest") for weights, how, *_ in EIGHT]
    wanted += [(weights, "activations=8", method) for method in METHODS for weights in FOUR]
    with interpreter.single_threaded():
        benches = (Bench(model, options.images) for model in options.models)
        rows = (bench.row(*each) for bench in benches for each in dict.fromkeys(wanted))
        found = plans.written(rows, RESULTS, images=options.images)
    if options.docs:
        for mark, table in tables(found).items():
            documents.insert(options.docs, f"fpq {mark}", table)


if __name__ == "__main__":
    main()
