"""A compiled denoiser against torch eager in float32: one step, one thread, interleaved, on this machine.

    python benchmarks/end_to_end.py --json benchmarks/results/end_to_end.json
    python benchmarks/end_to_end.py --model fashion-unet --target x86-64-avx2 --weights int3 --profile

For each batch size the artifact and the model take turns, so that what else the machine does meets both. Thread CPU
time does not count what others do; wall time is what a user sees. `ratio` is torch's median over the artifact's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.machine import provenance
from mpq_compiler import artifact, compiler, denoiser, runtime, targets

PIPELINE = (
    "trace,layout,calibrate{{samples=16,steps=4}},time-groups,bit-allocation{{uniform={}}},insert-fake-quant,"
    "residual-branch,round-weights,fold-fake-quant,fuse-epilogues"
)
BATCHES = (1, 8)


def clocks(function: Callable[[], Any]) -> tuple[float, float]:
    """(thread CPU seconds, wall seconds) of one call."""
    wall, cpu = time.perf_counter(), time.thread_time()
    function()
    return time.thread_time() - cpu, time.perf_counter() - wall


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each function: median and minimum of both clocks."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(clocks(function))
    result = {}
    for name, pairs in times.items():
        cpu, wall = ([1e3 * p[i] for p in pairs] for i in (0, 1))
        result[name] = {
            "cpu_ms": round(statistics.median(cpu), 4),
            "cpu_ms_min": round(min(cpu), 4),
            "wall_ms": round(statistics.median(wall), 4),
            "wall_ms_min": round(min(wall), 4),
        }
    return result


def measure(model: denoiser.Denoiser, path: Path, batch: int, repeats: int) -> dict[str, Any]:
    """One step of a batch, artifact against torch."""
    inputs = model.random_inputs(batch, 0)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    compiled = runtime.load(path, threads=1)
    with torch.no_grad():
        times = interleaved({"artifact": lambda: compiled.run(arrays), "torch": lambda: model(**inputs)}, repeats)
    ratio = {c: round(times["torch"][c] / times["artifact"][c], 2) for c in ("cpu_ms", "wall_ms")}
    return {"batch": batch, **times, "ratio": ratio}


def profile(path: Path, model: denoiser.Denoiser, batch: int, program: Any) -> list[tuple[str, float, int]]:
    """(kernel family, milliseconds, calls) of one step, each kernel called on its own with warm caches."""
    from mpq_compiler.backends.tvm import templates
    from mpq_compiler.backends.tvm.emit import lower
    from mpq_compiler.tensorfile import aligned_empty

    made = artifact.read(path)
    target = targets.resolve(made.manifest["target"]["name"])
    library = runtime.load(path, threads=1)._executor._ffi  # type: ignore[attr-defined]
    functions = library.load_module(str(made.file(artifact.KERNELS)))
    lowered = lower(program, (batch,))
    totals: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    slowest = []
    for call in lowered.functions[0].calls:
        inputs, outputs = templates.arguments(call.kernel, target)
        arrays = []
        for argument in (*inputs, *outputs):
            shape = tuple(batch if extent == "B" else int(extent) for extent in argument.shape)
            array = aligned_empty(shape, np.dtype(argument.dtype))
            array[...] = 0 if array.dtype.kind in "iu" else 1
            arrays.append(library.from_dlpack(array))
        function = functions.get_function(call.kernel.name, query_imports=True)
        seconds = min(clocks(lambda f=function, a=arrays: f(*a))[0] for _ in range(20))
        before, count = totals[call.kernel.template]
        totals[call.kernel.template] = (before + 1e3 * seconds, count + 1)
        slowest.append((1e3 * seconds, str(call.kernel)))
    for milliseconds, text in sorted(slowest, reverse=True)[:12]:
        print(f"  {milliseconds:8.4f} ms  {text}")
    return sorted(((k, ms, n) for k, (ms, n) in totals.items()), key=lambda row: -row[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-unet")
    parser.add_argument("--target", action="append", help="default: every CPU target that this machine runs")
    parser.add_argument("--weights", action="append", help="uniform formats; default int8 and int3")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--profile", action="store_true", help="also the time of each family of kernels")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.target or [
        name
        for name, row in targets.TARGETS.items()
        if row.backend == "tvm" and row.implemented and not targets.missing_features(row)
    ]
    model = denoiser.load(options.model)
    rows = []
    for weights in options.weights or ("int8", "int3"):
        chosen = compiler.Options(pipeline=PIPELINE.format(weights), target=names[0])
        program, _, _, _ = compiler.lower(model, chosen)
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model.mpq")
                start = time.perf_counter()
                _write(path, model, program, targets.resolve(name))
                seconds = round(time.perf_counter() - start, 1)
                for batch in BATCHES:
                    row = {"target": name, "weights": weights, "build_s": seconds}
                    row |= measure(model, path, batch, options.repeats)
                    rows.append(row)
                    cpu = (row["artifact"]["cpu_ms"], row["torch"]["cpu_ms"], row["ratio"]["cpu_ms"])
                    print(f"{name} {weights} batch {batch}: artifact {cpu[0]} ms, torch {cpu[1]} ms, x{cpu[2]}")
                    if options.profile:
                        for kind, milliseconds, count in profile(path, model, batch, program):
                            print(f"  {kind:12} {milliseconds:8.3f} ms in {count} calls")
    if options.json:
        document = {**provenance(), "model": options.model, "threads": 1, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def _write(path: Path, model: denoiser.Denoiser, program: Any, target: targets.Target) -> None:
    from mpq_compiler.backends.tvm.build import build

    built = build(program, target, BATCHES, jobs=2)
    manifest: dict[str, Any] = {
        "name": model.name,
        "target": {
            "name": target.name,
            "arch": target.arch,
            "backend": target.backend,
            "features": list(target.features),
        },
        "model": {"class": "Benchmark", "config": {}, "parameters": program.facts["parameters"]},
        "functions": built.functions,
        "prepare": built.prepare,
        "tensors": built.entries,
        "versions": {},
    }
    artifact.write(path, manifest, built.files, built.tensors)


if __name__ == "__main__":
    main()
