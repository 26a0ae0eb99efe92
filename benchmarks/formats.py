"""What every weight format gives: in all layers of the bundled UNet, and layer by layer of the bundled denoisers.

    python -m benchmarks.formats [--only NAMES] [--json FILE] [--docs FILE]

The UNet is calibrated once as by default; then each format is the only one, with GPTQ rounding as in the default
recipe and without. Quality is the teacher-forced SQNR of the simulated program on the 64 held-out inputs that
`mpqc compile` judges by: of W8A8 about 34 dB, which the 8-bit activations allow. The example layer is the largest.

Layers of all three denoisers stand for themselves in formats of up to 3 bits and what these store beside codes: the
output of each on calibration's inputs in float over its error, with GPTQ alone, with scales searched behind it, and
along several paths on top of that, as in the default recipe; means in dB over layers of `LEAST` numbers and more.
Entropy-coded weights of 2.24 bits are held against the best mixture of two of the other formats. --docs writes both
tables between the marks of docs/formats.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import documents
from benchmarks.machine import provenance
from benchmarks.quality_cells import MODELS
from mpq_compiler import formats
from mpq_compiler.driver import judge
from mpq_compiler.driver.options import Options
from mpq_compiler.evaluation.metrics import sqnr_db
from mpq_compiler.formats.base import output_error
from mpq_compiler.frontend import denoiser
from mpq_compiler.ir import costs, interpreter
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import PARAMETERS, Program, Stage, TensorStore
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.parser import parse
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import Layer, Rounding
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.statistics import GRAM, RANGE, VALUES
from mpq_compiler.support.execution import batches

MODEL = "fashion-unet"
FRONT = "trace,layout,calibrate,time-groups"
BACK = "bit-allocation{{uniform={}}},insert-fake-quant,residual-branch,low-rank,round-weights{{method={}}}"
RATES = ("1", "1.25", "1.7", "2.1", "2.24", "2.5", "3", "4")
SPELLED = ("int4g32", "nf4g64", "int4+r4", "int4+r16", *(f"ec{rate}" for rate in RATES))
METHODS = ("nearest", "gptq")
LAYER_METHODS = {
    Rounding.GPTQ: "codes by GPTQ",
    Rounding.GPTQ_SCALES: "scales searched",
    Rounding.GPTQ_PATHS: "and along several paths",
}
LEAST = 4000
"""Numbers of a weight that is one of these layers: of smaller ones tables and histograms are most bytes."""
MOST_BITS = 3.3
"""Of 3 bits with what is stored beside codes, of layers as small as those of `fashion-dit`."""
CLAIMED = "ec2.24"
"""Is held against mixtures of formats that are not entropy-coded."""
RESULTS = Path(__file__).parent / "results" / "formats.json"


@functools.cache
def _calibrated(name: str) -> tuple[Session, Program]:
    """A bundled denoiser as the allocation finds it."""
    session = Session(denoiser.load(name), requests=Requests(frozenset({RANGE, VALUES, GRAM})))
    front, _ = manager.run_pipeline(parse(FRONT), Program(fx.Graph(), TensorStore(), (), Stage.FLOAT), session)
    return session, front


def measure(names: Sequence[str], done: Callable[[dict[str, Any]], None]) -> None:
    """Calls ``done`` with the row of each format in all layers of `MODEL`."""
    model = denoiser.load(MODEL)
    held_out = judge.held_out(model, Options())
    expected = model(**held_out).numpy()
    with interpreter.single_threaded():
        session, front = _calibrated(MODEL)
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


def measure_layers(model: str, names: Sequence[str], done: Callable[[dict[str, Any]], None]) -> None:
    """Calls ``done`` with the row of each format of few bits: bits and SNR of the layers of a model."""
    with interpreter.single_threaded():
        _, front = _calibrated(model)
        calls = {str(weight_of(n)): n for n in front.quantizable}
        layers = [Layer.of(front, call, weight) for weight, call in calls.items()]
        layers = [layer for layer in layers if layer.weight.numel() >= LEAST and layer.moments is not None]
        numbers = sum(layer.weight.numel() for layer in layers)
        for name in names:
            bits = 8 * sum(formats.get(name).stored_bytes(*layer.weight.shape) for layer in layers) / numbers
            if bits > MOST_BITS:
                continue
            row: dict[str, Any] = {"model": model, "format": name, "bits": bits, "layers": len(layers)}
            for rounding in LAYER_METHODS:
                row[rounding] = statistics.mean(_snr_db(layer, name, rounding) for layer in layers)
            decibels = "  ".join(f"{how} {row[rounding]:.1f} dB" for rounding, how in LAYER_METHODS.items())
            print(f"{model}  {name:10} {bits:.2f} bits  {decibels}", flush=True)
            done(row)


def _snr_db(layer: Layer, name: str, rounding: Rounding) -> float:
    """The power of a layer's output on calibration's inputs over that of its error in a format, in dB."""
    rows, gram = layer.read().flatten(1), layer.moments
    error = layer.fit(name, rounding).dequantize().reshape(rows.shape) - rows
    signal, noise = (float(output_error(x, gram).sum()) for x in (rows, error))
    return 10 * math.log10(signal / noise)


def mixture(points: Sequence[tuple[float, float]], bits: float) -> float:
    """The most dB at so many bits that one of some formats has, or a mixture of two, given as (bits, dB)."""
    found = [db for own, db in points if own <= bits]
    for less, low in points:
        found += [low + (high - low) * (bits - less) / (more - less) for more, high in points if less < bits <= more]
    return max(found)


def claim(rows: Sequence[dict[str, Any]], model: str) -> str | None:
    """What entropy-coded weights have over the others in the layers of a model; None where it was not measured."""
    of_format = {row["format"]: row for row in rows if row["model"] == model}
    others = [row for name, row in of_format.items() if not name.startswith("ec")]
    if CLAIMED not in of_format or not others:
        return None
    own = of_format[CLAIMED]
    best = [mixture([(row["bits"], row[rounding]) for row in others], own["bits"]) for rounding in LAYER_METHODS]
    gained = ", ".join(
        f"{how} {own[rounding]:.1f} dB, {own[rounding] - db:+.1f} to {db:.1f}"
        for (rounding, how), db in zip(LAYER_METHODS.items(), best, strict=True)
    )
    layers = f"{own['layers']} layers of {own['bits']:.2f} bits a number"
    return f"{model}, {layers}, to the best mixture of other formats: {gained}"


def table_of_layers(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: bits of the layers of every model, and their SNR by every way to choose codes."""
    found = {(row["model"], row["format"]): row for row in rows}
    least = {name: min(row["bits"] for row in rows if row["format"] == name) for _, name in found}
    names = sorted(least, key=lambda name: (least[name], name))

    def cell(model: str, name: str) -> str:
        row = found.get((model, name))
        return f"{row['bits']:.2f}: {', '.join(f'{row[rounding]:.1f}' for rounding in LAYER_METHODS)}" if row else ""

    lines = [[f"`{name}`", *(cell(model, name) for model in MODELS)] for name in names]
    return documents.table(["format", *(f"`{model}`, bits: dB" for model in MODELS)], lines)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown: bytes and quality of a model all of whose layers have one format."""
    lines = []
    for row in sorted(rows, key=lambda r: r["bytes"]):
        bits = (f"{row[name]:.2f}" for name in ("layer_bits", "bits"))
        lines.append([f"`{row['format']}`", *bits, *(f"{row[f'{method}_db']:.1f}" for method in METHODS)])
    headers = ("format", "bits of the largest layer", "true bits of the model", "nearest, dB", "GPTQ, dB")
    return documents.table(headers, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="formats, separated by commas")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where rows are kept; other formats' rows stay")
    parser.add_argument("--docs", type=Path, help="write the table into this file")
    options = parser.parse_args()
    kept = json.loads(options.json.read_text()) if options.json.exists() else {}
    rows = {row["format"]: row for row in kept.get("rows", ())}
    layers = {(row["model"], row["format"]): row for row in kept.get("layers", ())}

    def write() -> None:
        own = {"rows": [rows[name] for name in sorted(rows)], "layers": [layers[key] for key in sorted(layers)]}
        options.json.write_text(json.dumps({**provenance(), "model": MODEL, **own}, indent=1) + "\n")

    def keep(row: dict[str, Any]) -> None:
        rows[row["format"]] = row
        write()

    def keep_layers(row: dict[str, Any]) -> None:
        layers[row["model"], row["format"]] = row
        write()

    names = options.only.split(",") if options.only else list(dict.fromkeys([*formats.FORMATS, *SPELLED]))
    for model in MODELS:
        measure_layers(model, names, keep_layers)
    claims = [said for model in MODELS if (said := claim([*layers.values()], model))]
    print("", *claims, "", sep="\n", flush=True)
    measure(names, keep)
    if options.docs:
        documents.insert(options.docs, "formats", table([*rows.values()]))
        documents.insert(options.docs, "layers", table_of_layers([*layers.values()]))


if __name__ == "__main__":
    main()
