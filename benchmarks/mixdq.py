"""Keys and values of a text at 4 to 6 bits: as they are, without the text's first token, and with decoupled budgets.

    python benchmarks/mixdq.py [--json FILE] [--docs FILE]
    python benchmarks/mixdq.py --student FOLDER --steps 2 [--docs FILE]     # of benchmarks.train_student

The first two plans have all layers at 8 bits but those that read the text: their weights have 4 bits, and the text the
bits of the row. The others are integer programs with the bytes and the average bits of activations of the second plan,
one for all layers and one by content and quality layers. Images are drawn in 10 steps from three seeds that no
candidate was judged by; the ratio is of the float model's latents to the error, over prompts. A second table has the
objectives of the program at fewer true bits, 8-bit activations. --docs writes both between the marks of
docs/recipes/mixdq.md. A student draws in its few steps, and is calibrated on these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import documents, plans
from mpq_compiler.ir import costs, interpreter
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.findings import ALLOCATION
from mpq_compiler.ir.program import ActivationPlan, Program
from mpq_compiler.quantization.fitting import activation_parameters

MODEL, TEXT = "fashion-text", "encoder_hidden_states"
FRONT = "trace,layout,{}calibrate{},time-groups"
ROWS = 256
"""Inputs that a student is calibrated on."""
SENSITIVITY = "sensitivity{formats=int2/int3/int4/int8,activations=4/5/6/8}"
RATIOS = "ratios=0.46/0.66/0.86/1.06/1.26,activation_ratios=0.94/0.97/1.0/1.03/1.06/1.09"
BACK = "insert-fake-quant,round-weights"
BITS = (4, 5, 6)
PLANS = ("naive", "BOS-aware", "mixed", "decoupled")
SCAN = "ratios=0.46/0.56/0.66/0.76/0.86/0.96/1.06/1.16/1.26/1.36"
OBJECTIVES = {
    "noise, one budget": "objective=noise",
    "noise, decoupled": f"objective=noise,{SCAN}",
    "dB, one budget": "objective=paper-db",
    "dB, decoupled": f"objective=paper-db,{SCAN}",
}
TRUE_BITS = (3, 4)
RESULTS = Path(__file__).parent / "results" / "mixdq.json"


class Bench(plans.Judge):
    """`floats` is naive; `aware` has the text's first token apart."""

    def __init__(self, images: int, model: str = MODEL, steps: int | None = None) -> None:
        calibrated = "" if steps is None else f"{{samples={ROWS // steps},steps={steps}}}"
        front = FRONT.format("", calibrated)
        super().__init__(model, frozenset({"range", "values", "gram"}), front, images, steps=steps)
        self.aware = self.passed(f"{FRONT.format('bos-split,', calibrated)},{SENSITIVITY}")

    def by_hand(self, front: Program, bits: int) -> Program:
        """8 bits but in the layers that read the text: weights of 4, and the text in so many."""
        program = self.passed("bit-allocation{uniform=int8}", front)
        for node in program.quantizable:
            if (edge := input_edge(node).name).startswith(TEXT):
                path = str(costs.weight_path(node))
                program.weights[path] = replace(program.weights[path], format="int4")
                scale, zero = activation_parameters(program, edge, bits)
                names = (program.tensors.add(f"{edge}:scale", scale), program.tensors.add(f"{edge}:zero_point", zero))
                program.activations[edge] = ActivationPlan(bits, *names)
        return program

    def plan(self, name: str, bits: int) -> Program:
        if name == "naive":
            return self.by_hand(self.floats, bits)
        if name in OBJECTIVES:
            return self.passed(f"bit-allocation{{weights={bits},{OBJECTIVES[name]}}}", self.aware)
        aware = self.by_hand(self.aware, bits)
        if name == "BOS-aware":
            return aware
        budget = f"weights=none,bytes={costs.stored_bytes(aware)},activations={costs.activation_bits(aware)!r}"
        return self.passed(f"bit-allocation{{{budget}{f',{RATIOS}' if name == 'decoupled' else ''}}}", self.aware)

    def row(self, name: str, bits: int) -> dict[str, Any]:
        plan = self.plan(name, bits)
        program = self.passed(BACK, plan)
        found = {
            "plan": name,
            "bits": bits,
            "activation_bits": costs.activation_bits(plan),
            **self.judged(plan, program),
            "candidates": plan.facts.get(ALLOCATION, {}).get("candidates"),
        }
        print(f"{name:17} {bits} bits: {plans.decibels(found)}", flush=True)
        return found


def tables(rows: Sequence[dict[str, Any]], steps: int | None = None) -> dict[str, str]:
    """The tables by their marks; those of a student name its steps."""
    found = {}
    of = "" if steps is None else f" {steps}"
    for mark, first, named in (("text", "bits of the text", PLANS), ("objectives", "budget, true bits", OBJECTIVES)):
        headers = (first, "plan", "true bits", "output, dB", "images, dB (least .. most)")
        lines = [[str(row["bits"]), row["plan"], *plans.columns(row)] for row in rows if row["plan"] in named]
        found[mark + of] = documents.table(headers, lines)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="default: results/mixdq.json, of a student mixdq-STEPS.json")
    parser.add_argument("--docs", type=Path, help="write the tables into this file")
    parser.add_argument("--images", type=int, default=64, help="from each seed (64)")
    parser.add_argument("--student", help="the folder of a model that draws in a few steps")
    parser.add_argument("--steps", type=int, help="in which the student draws")
    options = parser.parse_args()
    if (options.student is None) != (options.steps is None):
        parser.error("a student draws in a number of steps: give --student and --steps together")
    model, steps = options.student or MODEL, options.steps
    path = options.json or (RESULTS if steps is None else RESULTS.with_stem(f"{RESULTS.stem}-{steps}"))
    cells = [(name, bits) for bits in BITS for name in PLANS]
    cells += [(name, bits) for bits in TRUE_BITS for name in OBJECTIVES]
    with interpreter.single_threaded():
        bench = Bench(options.images, model, steps)
        about = MODEL if steps is None else f"{MODEL} in {steps} steps"
        rows = plans.written((bench.row(*cell) for cell in cells), path, model=about, images=options.images)
    if options.docs:
        for mark, table in tables(rows, steps).items():
            documents.insert(options.docs, f"mixdq {mark}", table)


if __name__ == "__main__":
    main()
