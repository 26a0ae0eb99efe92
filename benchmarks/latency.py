"""Predicted against measured time of whole models, for several plans, on one thread.

    python -m benchmarks.latency                                 # all models, into benchmarks/results/latency.json
    python -m benchmarks.latency --model fashion-unet --runs 3

A latency table is measured from candidate plans, all weights in one format (`mpqc latency`). Three plans are compiled:
8 bits everywhere, a mix in a budget of 4 bits, and a mix in budgets of 6 bits and of a time between those of the first
two. In each run the table is measured anew and then the plans, by the CPU time of a call, in turns; the plans are never
part of the table. The error of a plan is the median over the runs; it must be within 15 %.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.end_to_end import save
from benchmarks.machine import provenance
from mpq_compiler.api import compile as driver_compile
from mpq_compiler.driver.measure import candidate_plans
from mpq_compiler.latency import measure as latency_measure
from mpq_compiler.latency import timing
from mpq_compiler.latency.candidates import runnable
from mpq_compiler.latency.table import predict
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.support import terminal

RESULTS = Path(__file__).parent / "results" / "latency.json"
PIPELINE = (
    "trace,layout,calibrate{{samples=4,steps=4}},time-groups,{}bit-allocation{{{}}},insert-fake-quant,residual-branch,"
    "round-weights,fold-fake-quant,fuse-epilogues"
)
SENSITIVITY = "sensitivity{{inputs=2,formats={}}},"
FORMATS = {"fashion-unet": ("int2", "int3", "int4", "int8"), "unet-70m": ("int2", "int4", "int8")}
"""By model: what its plans are mixed from."""
MIXED, LIMITED = 4.0, 6.0
"""True average bits of the plans: without and with a budget of time."""
GOAL = 0.15
ROUNDS = 15


def compiled(source: str, name: str, folder: Path, table: Path, jobs: int) -> dict[str, dict[str, Any]]:
    """The plans by name: what `mpqc compile` reports of each; the artifacts are in the folder."""
    found: dict[str, dict[str, Any]] = {}

    def compile(plan: str, options: str, measured: bool = True) -> float:
        passes = PIPELINE.format(SENSITIVITY.format("/".join(FORMATS[name])) if measured else "", options)
        report = driver_compile.compile(
            source, folder / f"{plan}.mpq", terminal.progress, pipeline=passes, latency_table=table, jobs=jobs,
            overwrite=True,
        )  # fmt: skip
        assert report.latency is not None and report.latency["missing"] == 0
        found[plan] = {"average_bits": report.weights["average_bits"], **report.latency}
        return float(report.latency["predicted_ms"])

    eight, mixed = compile("w8a8", "uniform=int8", measured=False), compile("mixed", f"weights={MIXED}")
    compile("limited", f"weights={LIMITED},latency={(eight + mixed) / 2:.6g}")
    return found


def run(plans: dict[str, CompiledDenoiser], candidates: Sequence[CompiledDenoiser], seconds: float) -> dict[str, Any]:
    """Predicted and measured milliseconds of each plan, and the one over the other less 1."""
    table = latency_measure.measured(candidates, seconds=seconds)
    calls = {
        name: functools.partial(plan.run, timing.random_inputs(plan.manifest, 1)) for name, plan in plans.items()
    }
    repeats = {name: max(timing.repeats(call) for _ in range(3)) for name, call in calls.items()}
    times = {name: timing.Times() for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            timing.turn(call, repeats[name], times[name])
    found = {}
    for name, plan in plans.items():
        said = predict(table, latency_measure.problems(timing.kernel_calls(plan), plan))
        took = 1e3 * statistics.median(times[name].cpu)
        found[name] = {
            "predicted_ms": said.ms,
            "missing": len(said.missing),
            "measured_ms": took,
            "error": said.ms / took - 1,
        }
    return found


def measure(name: str, folder: Path, runs: int, seconds: float, jobs: int) -> dict[str, Any]:
    """The document of a model."""
    source = save(name, folder)
    folder = folder / f"{name}-latency"
    folder.mkdir(exist_ok=True)
    everywhere = PIPELINE.format("", f"uniform={FORMATS[name][0]}")
    plans = candidate_plans(source, terminal.progress, FORMATS[name], pipeline=everywhere, jobs=jobs)
    with plans as made:
        loaded = runnable(made)
        path = folder / "table.json"
        path.write_text(json.dumps(latency_measure.measured(loaded, seconds=seconds).to_json()))
        plans = compiled(source, name, folder, path, jobs)
        artifacts = {plan: compiled_denoiser.load(folder / f"{plan}.mpq", 1, reuse_bytes=0) for plan in plans}
        found = [run(artifacts, loaded, seconds) for _ in range(runs)]
    for plan, about in plans.items():
        errors = [each[plan]["error"] for each in found]
        about |= {"error": statistics.median(errors), "spread": [min(errors), max(errors)]}
        about["within"] = abs(about["error"]) <= GOAL
    return {"model": name, "plans": plans, "runs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="in which a table is measured, at the least")
    parser.add_argument("--jobs", type=int, default=2, help="to compile with")
    parser.add_argument("--folder", type=Path, help="for models and artifacts, kept between calls (default: temporary)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results go; those of other models stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.model:
            row = measure(name, folder, options.runs, options.seconds, options.jobs)
            for plan, about in row["plans"].items():
                low, high = about["spread"]
                told = f"{100 * about['error']:+.1f} % ({100 * low:+.1f} .. {100 * high:+.1f})"
                budget = "" if about["budget_ms"] is None else f", budget {about['budget_ms']:.3f} ms"
                print(f"{name} {plan}: {about['average_bits']:.2f} bits{budget}: {told}", flush=True)
            known = json.loads(options.json.read_text()) if options.json.exists() else {}
            models = {m["model"]: m for m in known.get("models", ())} | {name: row}
            document = {**provenance(), "goal": GOAL, "models": [models[n] for n in FORMATS if n in models]}
            options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
