"""Speed of the integer kernels against the peak of the CPU's dot product, one thread.

    python benchmarks/kernels.py [--isa NAME] [--rounds N] [--only TEXT] [--json FILE]

All kernels and a loop of nothing but dot products on registers (the peak) run interleaved, in rounds; each
figure is the least CPU time of the thread over the rounds. `reached` is the share of the peak that the useful
multiply-accumulates take: padded channels and recomputed rows count as lost. Activations are already
quantized, the result is float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["TVM_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tvm

from benchmarks.machine import provenance
from benchmarks.timing import interleaved
from mpq_compiler.backends.tvm import peak
from mpq_compiler.backends.tvm.kernels import gemm, prepare
from mpq_compiler.backends.tvm.kernels.isa import ISAS, Isa, isa
from mpq_compiler.backends.tvm.kernels.problem import QuantMatmul
from tests.shapes import concrete, make_case

SAME: dict = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}


def problems() -> dict[str, QuantMatmul]:
    """The large shapes of latent-diffusion U-Nets, and those of the bundled denoiser at batch 1."""
    table: dict[str, QuantMatmul] = {}
    for rows in (1, 64, 256, 1024):
        for bits in (8, 4, 3, 2):
            table[f"linear {rows}x640x640 w{bits}"] = QuantMatmul.linear((rows,), 640, 640, bits=bits)
    for side, channels in ((32, 640), (64, 320), (16, 1280)):
        for bits in (8, 4):
            name = f"conv3x3 {side}x{side}x{channels} w{bits}"
            table[name] = QuantMatmul(side, side, channels, channels, bits=bits, **SAME)
    small = ((28, 1, 48), (28, 48, 48), (14, 48, 96), (14, 96, 96), (7, 192, 192), (28, 48, 1))
    for side, channels, outputs in small:
        for bits in (8, 4, 3):
            name = f"small conv3x3 {side}x{side}x{channels}->{outputs} w{bits}"
            table[name] = QuantMatmul(side, side, channels, outputs, bits=bits, **SAME)
    for rows, channels, outputs in ((196, 96, 96), (49, 192, 192), (1, 48, 192), (1, 192, 192)):
        for bits in (8, 4):
            name = f"small linear {rows}x{channels}x{outputs} w{bits}"
            table[name] = QuantMatmul.linear((rows,), channels, outputs, bits=bits)
    return table


def kernel(problem: QuantMatmul, target: Isa) -> tuple[Callable[[], object], int]:
    """A call of the kernel on random data at batch 1, and its useful multiply-accumulates."""
    functions = {"kernel": gemm.build(problem, target, "kernel")}
    functions["prepare"] = prepare.build(problem, target, "prepare")
    library = tvm.compile(tvm.IRModule(functions), target=target.target())
    buffers = make_case(problem, 1, 0).stored()
    for a in (*prepare.outputs(problem, target), gemm.arguments(problem, target)[-1]):
        buffers[a.name] = np.zeros(concrete(a.shape, 1), a.dtype)
    tensors = {name: tvm.runtime.tensor(np.ascontiguousarray(value)) for name, value in buffers.items()}
    made = [*prepare.inputs(problem), *prepare.outputs(problem, target)]
    library["prepare"](*[tensors[a.name] for a in made])
    function, args = library["kernel"], [tensors[a.name] for a in gemm.arguments(problem, target)]
    return lambda: function(*args), problem.rows * problem.reduction * problem.outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [name for name in ISAS if name.startswith("x86")]
    parser.add_argument("--isa", default=names[0], choices=names)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", help="measure the kernels whose name contains this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = isa(options.isa)
    calls, work = {}, {}
    calls["peak"], work["peak"] = peak.integer(target)
    for name, problem in problems().items():
        if options.only in name:
            calls[name], work[name] = kernel(problem, target)
    seconds = {name: min(times) for name, times in interleaved(calls, options.rounds).items()}
    top = work["peak"] / seconds["peak"]
    rows: list[dict] = [
        {"name": name, "us": 1e6 * seconds[name], "gmacs": work[name] / seconds[name] / 1e9,
         "reached": work[name] / seconds[name] / top}
        for name in calls
    ]  # fmt: skip
    for row in rows:
        speed = f"{row['us']:10.1f} us {row['gmacs']:7.0f} GMAC/s {100 * row['reached']:5.0f} %"
        print(f"{row['name']:42s} {speed}")
    if options.json:
        report: dict = {**provenance(), "isa": target.name, "threads": 1, "rounds": options.rounds}
        report["peak_gmacs"] = top / 1e9
        report["rows"] = rows
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
