"""Every weight format in all layers of the bundled denoiser: bytes, true bits and quality.

    python -m benchmarks.formats [--only NAMES] [--json FILE] [--docs FILE]

The model is calibrated once as by default; then each format is the only one, with GPTQ rounding as in the default
recipe and without. Quality is the teacher-forced SQNR of the simulated program on the 64 held-out inputs that
`mpqc compile` judges by: of W8A8 about 34 dB, which the 8-bit activations allow. The example layer is the largest.
--docs writes the table between the marks of docs/formats.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import documents
from benchmarks.machine import provenance
from mpq_compiler import formats
from mpq_compiler.driver import judge
from mpq_compiler.driver.options import Options
from mpq_compiler.evaluation.metrics import sqnr_db
from mpq_compiler.frontend import denoiser
from mpq_compiler.ir import costs, interpreter
from mpq_compiler.ir.graph import weight_of
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
BACK = "bit-allocation{{uniform={}}},insert-fake-quant,residual-branch,low-rank,round-weights{{method={}}}"
RATES = ("1", "1.25", "1.7", "2.1", "2.5", "3", "4")
SPELLED = ("int4g32", "nf4g64", "int4+r4", "int4+r16", *(f"ec{rate}" for rate in RATES))
METHODS = ("nearest", "gptq")
RESULTS = Path(__file__).parent / "results" / "formats.json"


def measure(names: list[str], done: Callable[[dict[str, Any]], None]) -> None:
    """Calls ``done`` with the row of each format."""
    import numpy as np
    from torch import fx

    model = denoiser.load(MODEL)
    held_out = judge.held_out(model, Options())
    expected = model(**held_out).numpy()
    session = Session(model, requests=Requests(frozenset({RANGE, VALUES, GRAM})))
    with interpreter.single_threaded():
        start = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
        front, _ = manager.run_pipeline(parse(FRONT), start, session)
        present = {p for each in parse(FRONT) for p in each.provides}
        largest = max((front.tensors[str(weight_of(n))] for n in front.quantizable), key=lambda t: t.numel())
        for name in names:
            row: dict[str, Any] = {"format": name, "layer_bits": 8 * formats.get(name).stored_bytes(*largest.shape)}
            row["layer_bits"] /= largest.numel()
            for method in METHODS:
                begin = time.perf_counter()
                passes = parse(BACK.format(name, method))
                program, _ = manager.run_pipeline(passes, front, session, present=present)
                row[f"{method}_seconds"] = time.perf_counter() - begin
                y = np.concatenate([run(program, part).numpy() for part in batches(held_out)])
                row[f"{method}_db"] = sqnr_db(expected, y)
            planned, _ = manager.run_pipeline(passes[:1], front, session, present=present)
            row["bytes"] = costs.stored_bytes(planned)
            row["bits"] = costs.average_bits(row["bytes"], planned.facts[PARAMETERS])
            kept = f"{row['bits']:.2f} bits  nearest {row['nearest_db']:.1f} dB  gptq {row['gptq_db']:.1f} dB"
            print(f"{name:10} {kept}", flush=True)
            done(row)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| format | bits of the largest layer | true bits of the model | nearest, dB | GPTQ, dB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda r: r["bytes"]):
        kept = f"{row['layer_bits']:.2f} | {row['bits']:.2f} | {row['nearest_db']:.1f} | {row['gptq_db']:.1f}"
        lines.append(f"| `{row['format']}` | {kept} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="formats, separated by commas")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where rows are kept; other formats' rows stay")
    parser.add_argument("--docs", type=Path, help="write the table into this file")
    options = parser.parse_args()
    rows = {}
    if options.json.exists():
        rows = {row["format"]: row for row in json.loads(options.json.read_text())["rows"]}

    def keep(row: dict[str, Any]) -> None:
        rows[row["format"]] = row
        document = {**provenance(), "model": MODEL, "rows": [rows[name] for name in sorted(rows)]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")

    measure(options.only.split(",") if options.only else [*formats.FORMATS, *SPELLED], keep)
    if options.docs:
        documents.insert(options.docs, "formats", table([*rows.values()]))


if __name__ == "__main__":
    main()
