"""Compiles a tiny random model of every family of diffusers' denoisers, and writes the table of docs/models.md.

    python benchmarks/families.py
    python benchmarks/families.py --family dit sana    # these two rows anew

Each model is traced, compiled at 8 bits with an empty cache, and judged on 64 inputs that calibration has not seen.
Weights are random: the decibels say how artifact and packed program agree (docs/ir.md, contract (c)), not how a trained
model fares.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.machine import provenance
from mpq_compiler.api import compile
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program, Stage, TensorStore
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.parser import parse
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError
from tests.harness import families, tiny

ROWS = 256
"""Of the calibration file; every fourth is kept to judge by."""
RECIPE = "w8a8"
DOCS = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=tiny.ALL_FAMILIES, choices=tiny.ALL_FAMILIES)
    parser.add_argument("--target", default="native")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for family in options.family:
        write(family, row(family, options.target, options.jobs), options.target)


def row(family: str, target: str, jobs: int) -> str:
    """A line of the table."""
    model = families.denoiser(family)
    cells = [f"`{family}`", f"`{type(model.module.model).__name__}`", traced(model)]
    with tempfile.TemporaryDirectory() as folder:
        chosen = {
            "calibration": families.calibration(model, Path(folder, "calibration.safetensors"), ROWS),
            "recipe": RECIPE,
            "target": target,
            "jobs": jobs,
            "shapes": families.shapes(model),
            "cache": Path(folder, "cache"),
        }
        begin = time.perf_counter()
        try:
            report = compile.compile(model, Path(folder, "model.mpq"), **chosen)
        except UserError as error:
            return "| " + " | ".join([*cells, str(error), "", "", ""]) + " |"
    cells.append(f"{time.perf_counter() - begin:.0f} s")
    quality, difference = report.quality, report.quality["agreement_db"]
    cells += [f"{report.weights['average_bits']:.2f} bits, {quality['sqnr_db']:.1f} dB"]
    cells += [f"not run here ({target})" if difference is None else f"{difference + 0.0:+.4f} dB"]
    kinds = Counter(report.fallbacks.values())
    cells.append("; ".join(f"{count} x {reason}" for reason, count in sorted(kinds.items())) or "nothing")
    return "| " + " | ".join(cells) + " |"


def traced(model: Denoiser) -> str:
    """Whether the traced program gives the model's own bits, at a batch it was not traced with."""
    start = Program(torch.fx.Graph(), TensorStore(), (), Stage.FLOAT)
    try:
        program, _ = manager.run_pipeline(parse("trace"), start, Session(model))
    except UserError as error:
        return str(error)
    inputs = model.random_inputs(5, 1)
    return "bit for bit" if torch.equal(run(program, inputs), model(**inputs)) else "differs"


def write(family: str, line: str, target: str) -> None:
    """Puts a line into the table of docs/models.md, in place of the family's old one."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {old.split("`")[1]: old for old in table.splitlines() if old.startswith("| `")} | {family: line}
    where = provenance()
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    head = f"| family | class | traced | compiled in | {RECIPE}: bits, SQNR | artifact - reference | stays float |"
    lines = [BEGIN, head, "|" + " --- |" * (head.count("|") - 1)]
    lines += [rows[name] for name in tiny.ALL_FAMILIES if name in rows]
    lines += ["", f"Target `{target}` on {where['cpu']}; {versions}.", END]
    DOCS.write_text(before + "\n".join(lines) + after, encoding="utf-8")
    print(line, flush=True)


if __name__ == "__main__":
    main()
