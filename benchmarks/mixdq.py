"""Keys and values of a text at 4 to 6 bits: as they are, without the text's first token, and with decoupled budgets.

    python benchmarks/mixdq.py [--json FILE] [--docs FILE]

The first two plans have all layers at 8 bits but those that read the text: their weights have 4 bits, and the text the
bits of the row. The others are integer programs with the bytes and the average bits of activations of the second plan,
one for all layers and one by content and quality layers. Images are drawn in 10 steps from three seeds that no
candidate was judged by; the ratio is of the float model's latents to the error, over prompts. A second table has the
objectives of the program at fewer true bits, 8-bit activations. --docs writes both between the marks of
docs/recipes.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import fx

from benchmarks import documents
from benchmarks.machine import provenance
from mpq_compiler import compiler, costs, denoiser, pass_manager
from mpq_compiler.ablation import noise_power
from mpq_compiler.calibration import input_edge
from mpq_compiler.distillation import Gallery
from mpq_compiler.fitting import activation_parameters
from mpq_compiler.pass_manager import Session
from mpq_compiler.program import ActivationPlan, Program, Stage, TensorStore, run

MODEL, TEXT = "fashion-text", "encoder_hidden_states"
FRONT = "trace,layout,{}calibrate,time-groups"
SENSITIVITY = "sensitivity{formats=int2/int3/int4/int8,activations=4/5/6/8}"
RATIOS = "ratios=0.46/0.66/0.86/1.06/1.26,activation_ratios=0.94/0.97/1.0/1.03/1.06/1.09"
BACK = "insert-fake-quant,round-weights"
BITS = (4, 5, 6)
SEEDS = (101, 102, 103)
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


class Bench:
    def __init__(self, images: int) -> None:
        self.model = denoiser.load(MODEL)
        self.session = Session(self.model, statistics=frozenset({"range", "values", "gram"}))
        self.held_out = compiler.held_out(self.model, compiler.Options())
        self.present: set[str] = set()
        start = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
        self.naive = self.passed(FRONT.format(""), start)
        self.aware = self.passed(f"{FRONT.format('bos-split,')},{SENSITIVITY}", start)
        self.reference = run(self.naive, self.held_out)
        galleries = (Gallery.drawn(replace(self.session, seed=seed), images) for seed in SEEDS)
        self.galleries = [gallery for gallery in galleries if gallery is not None]

    def passed(self, pipeline: str, program: Program) -> Program:
        passes = pass_manager.parse(pipeline)
        self.present |= {p for each in passes for p in each.provides}
        return pass_manager.run_pipeline(passes, program, self.session, present=self.present)[0]

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
            return self.by_hand(self.naive, bits)
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
            "true_bits": costs.average_bits(costs.stored_bytes(plan), plan.facts["parameters"]),
            "activation_bits": costs.activation_bits(plan),
            "output_db": -10 * math.log10(noise_power(run(program, self.held_out), self.reference)),
            "image_db": [-10 * math.log10(gallery.noise(program)) for gallery in self.galleries],
            "candidates": plan.facts.get("allocation", {}).get("candidates"),
        }
        images = ", ".join(f"{db:.2f}" for db in found["image_db"])
        print(f"{name:17} {bits} bits: output {found['output_db']:.2f} dB, images {images} dB", flush=True)
        return found


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The tables by their marks."""
    found = {}
    for mark, first, plans in (("text", "bits of the text", PLANS), ("objectives", "budget, true bits", OBJECTIVES)):
        lines = [f"| {first} | plan | true bits | output, dB | images, dB (least .. most) |", "| --- " * 5 + "|"]
        for row in (row for row in rows if row["plan"] in plans):
            images = row["image_db"]
            spread = f"{statistics.mean(images):.1f} ({min(images):.1f} .. {max(images):.1f})"
            lines.append(
                f"| {row['bits']} | {row['plan']} | {row['true_bits']:.2f} | {row['output_db']:.1f} | {spread} |"
            )
        found[mark] = "\n".join(lines)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, help="write the tables into this file")
    parser.add_argument("--images", type=int, default=64, help="from each seed (64)")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    cells = [(name, bits) for bits in BITS for name in PLANS]
    cells += [(name, bits) for bits in TRUE_BITS for name in OBJECTIVES]
    with compiler.single_threaded():
        bench = Bench(options.images)
        for cell in cells:
            rows.append(bench.row(*cell))
            document = {**provenance(), "model": MODEL, "images": options.images, "rows": rows}
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.docs:
        for mark, table in tables(rows).items():
            documents.insert(options.docs, f"mixdq {mark}", table)


if __name__ == "__main__":
    main()
