"""Small floats against integers in all layers of the bundled denoiser: weights, activations, ways of rounding.

    python benchmarks/small_floats.py [--json FILE] [--docs FILE]

The model is calibrated once as by default. Quality is the teacher-forced SQNR of the simulated program on the 64
held-out inputs that `mpqc compile` judges by. --docs writes the tables between the marks of docs/recipes.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import documents
from benchmarks.machine import provenance
from mpq_compiler.driver import judge
from mpq_compiler.driver.options import Options
from mpq_compiler.evaluation.metrics import sqnr_db
from mpq_compiler.formats import activation
from mpq_compiler.frontend import denoiser
from mpq_compiler.ir import costs, interpreter, ops
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import PARAMETERS, Program, Stage, TensorStore
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.parser import parse
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.statistics import GRAM, RANGE, VALUES
from mpq_compiler.support.execution import batches

MODEL = "fashion-unet"
FRONT = "trace,layout,calibrate,time-groups"
BACK = "bit-allocation{{uniform={},{}}},insert-fake-quant,round-weights{{method={}}}"
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


class Bench:
    def __init__(self) -> None:
        from torch import fx

        self.model = denoiser.load(MODEL)
        self.held_out = judge.held_out(self.model, Options())
        self.expected = self.model(**self.held_out).numpy()
        self.session = Session(self.model, requests=Requests(frozenset({RANGE, VALUES, GRAM})))
        front = parse(FRONT)
        start = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
        self.front, _ = manager.run_pipeline(front, start, self.session)
        self.present = {p for each in front for p in each.provides}

    def row(self, weights: str, options: str, method: str = "nearest") -> dict[str, Any]:
        import numpy as np

        exponents = (lambda bits: (4,)) if options.endswith(E4M3) else activation.exponents
        begin = time.process_time()
        passes = parse(BACK.format(weights, options.removesuffix(f",{E4M3}"), method))
        with mock.patch.object(activation, "exponents", exponents):
            program, _ = manager.run_pipeline(passes, self.front, self.session, present=self.present)
        seconds = time.process_time() - begin
        y = np.concatenate([run(program, part).numpy() for part in batches(self.held_out)])
        planned, _ = manager.run_pipeline(passes[:1], self.front, self.session, present=self.present)
        kinds = Counter(plan.kind for plan in program.activations.values())
        encodings = Counter(f"e{n.args[3]}" for n in program.graph.nodes if n.target is ops.dequantize_float8)
        found = {"weights": weights, "options": options, "method": method, "db": sqnr_db(self.expected, y)}
        found |= {"seconds": seconds, "activations": dict(kinds), "encodings": dict(encodings)}
        found["bits"] = costs.average_bits(costs.stored_bytes(planned), planned.facts[PARAMETERS])
        print(f"{weights:6} {options:36} {method:8} {found['db']:.2f} dB  {seconds:.0f} s", flush=True)
        return found


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The tables by their marks."""
    known = {(r["weights"], r["options"], r["method"]): r for r in rows}
    eight = ["| weights | activations | true bits | SQNR, dB |", "| --- | --- | --- | --- |"]
    for weights, options, first, second in EIGHT:
        row = known[weights, options, "nearest"]
        eight.append(f"| {first} | {second} | {row['bits']:.2f} | {row['db']:.1f} |")
    four = ["| weights | nearest, dB | learned, dB | GPTQ, dB |", "| --- | --- | --- | --- |"]
    for weights in FOUR:
        cells = " | ".join(f"{known[weights, 'activations=8', method]['db']:.1f}" for method in METHODS)
        four.append(f"| `{weights}` | {cells} |")
    return {"activations": "\n".join(eight), "rounding": "\n".join(four)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="write the tables into this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with interpreter.single_threaded():
        bench = Bench()
        wanted = [(weights, how, "nearest") for weights, how, *_ in EIGHT]
        wanted += [(weights, "activations=8", method) for method in METHODS for weights in FOUR]
        for each in dict.fromkeys(wanted):
            rows.append(bench.row(*each))
            document = {**provenance(), "model": MODEL, "rows": rows}
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.docs:
        for mark, table in tables(rows).items():
            documents.insert(options.docs, f"fpq {mark}", table)


if __name__ == "__main__":
    main()
