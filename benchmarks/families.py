"""Compiles a tiny random model of every family of diffusers' denoisers, and writes the table of docs/models.md.

    python benchmarks/families.py                      # all, into docs/models.md
    python benchmarks/families.py --family dit sana    # prints the rows of two
    python benchmarks/families.py --recipe w8a8 default    # measures sensitivities too: minutes a family

Each model is traced, compiled and judged on 64 inputs that calibration has not seen. Weights are
random: the decibels say how artifact and packed program agree (docs/ir.md, contract (c)), not how a trained model
fares.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.machine import provenance
from mpq_compiler import compiler, pass_manager
from mpq_compiler.denoiser import Denoiser
from mpq_compiler.errors import UserError
from mpq_compiler.pass_manager import Session
from mpq_compiler.program import Program, Stage, TensorStore, run
from tests import families, tiny

ROWS = 64
"""Of the calibration file; every fourth is kept to judge by."""
RECIPES = {"w8a8": None, "default": 5.0}
"""Recipes and their budgets: in tiny layers scales and tables weigh more, and 4 bits cannot always be met."""
DOCS = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=tiny.ALL_FAMILIES, choices=tiny.ALL_FAMILIES)
    parser.add_argument("--recipe", nargs="+", default=["w8a8"], choices=RECIPES)
    parser.add_argument("--target", default="native")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for family in options.family:
        rows.append(row(family, options.recipe, options.target, options.jobs))
        print(rows[-1], flush=True)
    if list(options.family) == list(tiny.ALL_FAMILIES):
        write(rows, options.recipe, options.target)


def row(family: str, recipes: list[str], target: str, jobs: int) -> str:
    """A line of the table."""
    model = families.denoiser(family)
    cells = [f"`{family}`", f"`{type(model.module.model).__name__}`", traced(model)]
    left: dict[str, str] = {}
    for recipe in recipes:
        with tempfile.TemporaryDirectory() as folder:
            file = families.calibration(model, Path(folder, "calibration.safetensors"), ROWS)
            chosen = {"recipe": recipe, "weights": RECIPES[recipe], "target": target, "jobs": jobs}
            chosen["shapes"] = families.shapes(model)
            try:
                report = compiler.compile(model, Path(folder, "model.mpq"), calibration=file, **chosen)
            except UserError as error:
                cells += [str(error), ""]
                continue
        quality = report.quality
        difference = quality["agreement_db"]
        cells += [f"{report.weights['average_bits']:.2f} bits, {quality['sqnr_db']:.1f} dB"]
        cells += [f"not run here ({target})" if difference is None else f"{difference + 0.0:+.4f} dB"]
        left |= report.fallbacks
    kinds = Counter(left.values())
    cells.append("; ".join(f"{count} x {reason}" for reason, count in sorted(kinds.items())) or "nothing")
    return "| " + " | ".join(cells) + " |"


def traced(model: Denoiser) -> str:
    """Whether the traced program gives the model's own bits, at a batch it was not traced with."""
    start = Program(torch.fx.Graph(), TensorStore(), (), Stage.FLOAT)
    try:
        program, _ = pass_manager.run_pipeline(pass_manager.parse("trace"), start, Session(model))
    except UserError as error:
        return str(error)
    inputs = model.random_inputs(5, 1)
    return "bit for bit" if torch.equal(run(program, inputs), model(**inputs)) else "differs"


def write(rows: list[str], recipes: list[str], target: str) -> None:
    where = provenance()
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    columns = [f"{recipe}: bits, SQNR | artifact - reference" for recipe in recipes]
    head = " | ".join(("| family | class | traced", *columns, "stays float |"))
    lines = [head, "|" + " --- |" * head.count(" | ") + " --- |", *rows, ""]
    lines += [f"`{where['command']}`, target `{target}` ({where['cpu']}); {versions}."]
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
