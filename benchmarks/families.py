"""Compiles a tiny random model of every family of diffusers' denoisers, and writes the table of docs/models.md.

    python benchmarks/families.py
    python benchmarks/families.py --family dit sana    # these two rows anew
    python benchmarks/families.py --before 4dd561e     # seconds that `mpqc compile` takes, beside a commit's

Each model is traced, compiled at 8 bits with an empty cache, and judged on 64 inputs that calibration has not seen.
Weights are random: the decibels say how artifact and packed program agree (docs/ir.md, contract (c)), not how a trained
model fares. With ``--before`` the two states compile each model in processes of their own, in turn and with empty
caches, and the seconds of CPU time go to benchmarks/results/families.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
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
from mpq_compiler.ir import interpreter
from mpq_compiler.ir.program import Program, Stage, TensorStore
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.parser import parse
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError
from tests.harness import families, tiny

ROWS = 256
"""Of the calibration file; every fourth is kept to judge by."""
RECIPE = "w8a8"
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "models.md"
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=tiny.ALL_FAMILIES, choices=tiny.ALL_FAMILIES)
    parser.add_argument("--target", default="native")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--before", metavar="COMMIT", help="compare seconds with this state of the repository")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.before:
        compare(options.before, options.family, options.target)
        return
    for family in options.family:
        write(family, row(family, options.target, options.jobs), options.target)


# --- seconds, beside those of another state -----------------------------------------------------------------------


def compare(commit: str, chosen: list[str], target: str) -> None:
    """Compiles each family by this state and that of a commit, A B B A, and writes the seconds that they took."""
    known = subprocess.run(["git", "rev-parse", "--verify", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True)
    if known.returncode:
        sys.exit(f"'{commit}' is no commit of this repository")
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "before")
        subprocess.run(["git", "worktree", "add", "--detach", "-q", str(before), commit], cwd=ROOT, check=True)
        try:
            for family in chosen:
                command = compiling(family, Path(folder, family), target)
                seconds: dict[Path, list[float]] = {before: [], ROOT: []}
                for state in (before, ROOT, ROOT, before):
                    seconds[state].append(taken(command, state))
                then, now = (sum(seconds[state]) / 2 for state in (before, ROOT))
                rows[family] = {"before_s": round(then, 2), "now_s": round(now, 2), "ratio": round(now / then, 3)}
                print(f"{family:10} {then:6.1f} s before, {now:6.1f} s now: x {now / then:.2f}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)
    found = {**provenance(), "before": commit, "target": target, "families": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compiling(family: str, folder: Path, target: str) -> list[str]:
    """The command that compiles a family's tiny model, written to a folder with the inputs that calibrate it."""
    model = families.denoiser(family)
    model.module.model.save_pretrained(folder)
    (folder / "harness.json").write_text(json.dumps({"tokens": tiny.TOKENS}))  # what no file of diffusers says
    file = families.calibration(model, folder / "calibration.safetensors", ROWS // 4)
    given = {"--calibration": file, "--shapes": families.shapes(model), "--recipe": RECIPE, "--target": target}
    options = [str(word) for pair in given.items() for word in pair]
    return [sys.executable, "-m", "mpq_compiler", "compile", str(folder), *options]


def taken(command: list[str], state: Path) -> float:
    """Seconds of CPU time, user and system, of a command in a checkout, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        places = ["-o", f"{folder}/x.mpq", "--cache", f"{folder}/cache"]
        environment = {**os.environ, "PYTHONPATH": str(state)}
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([*command, *places], cwd=state, env=environment, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{state}: {run.stderr}")
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (end.ru_utime + end.ru_stime) - (begin.ru_utime + begin.ru_stime)


# --- the table ----------------------------------------------------------------------------------------------------


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
    return "bit for bit" if torch.equal(interpreter.run(program, inputs), model(**inputs)) else "differs"


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
