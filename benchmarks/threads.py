"""How kernels, and whole artifacts, scale on two threads, beside a kernel that only registers limit.

    python benchmarks/threads.py [--artifact PATH ...] [--only TEXT] [--seconds N] [--json FILE]

A window is: the control on one thread and on two, the subject on one and on two, the control again; all by the wall
clock. It counts where both controls scale by 1.9 or more, for otherwise something else used a core. Windows are tried
until 15 count or the time of a row is over; with fewer than 3 the row says NOT MEASURED. `kept` is the median of
scaling over the control's scaling in the same window. Kernels and the control share their loops among the threads that
artifacts bring along (mpq_pool.c); a whole artifact has its own.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tvm
import tvm_ffi

from benchmarks.kernels import kernel, problems
from benchmarks.machine import provenance
from benchmarks.timing import wall
from mpq_compiler.backends.tvm.compile import peak
from mpq_compiler.backends.tvm.compile.link import compile_pool
from mpq_compiler.backends.tvm.kernels.cpu import templates
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS, isa
from mpq_compiler.backends.tvm.kernels.problems.attention import Attention
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.runtime.tvm import VirtualMachine
from mpq_compiler.targets import table as targets

VALID = 1.9
"""Scaling of the control from which on a window counts."""
LEAST, MOST = 3, 15
"""Windows of a row: fewer are no measurement, more are not needed."""
GOAL = 0.93
WINDOW = 1e-3
"""Seconds, about, of a subject on one thread in a window, where a call takes less."""

Call = Callable[[], object]


def subjects(only: str, artifacts: list[Path], target: Any) -> dict[str, tuple[Call, Call]]:
    """What is measured: calls on one thread and on two."""
    large = (*(f"linear {rows}x640x640" for rows in (64, 256, 1024)), "conv3x3 32x32x640", "conv3x3 64x64x320")
    groups = {name: problems()[name] for name in (*large, "conv3x3 16x16x1280")}
    chosen = {f"{name} {kind}": group[kind] for name, group in groups.items() for kind in ("w8", "w4")}
    same: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
    for side, channels in ((8, 1280), (4, 1280)):
        chosen[f"conv3x3 {side}x{side}x{channels} w8"] = QuantMatmul(side, side, channels, channels, **same)
    found: dict[str, Call] = {}
    for name, problem in chosen.items():
        if only in name:
            found[name] = kernel(problem, target)[0]
    others: dict[str, tuple[str, Any]] = {
        "attention 1024x640": ("attention", Attention(1024, 1024, 8, 80)),
        "group norm 4096x320": ("norms", GroupNorm(4096, 320, 32)),
        "layer norm 4096x320": ("norms", LayerNorm(4096, 320)),
    }
    for name, (kind, problem) in others.items():
        if only in name:
            found[name] = of_floats(kind, problem, target)
    calls = {name: (on(1, call), on(2, call)) for name, call in found.items()}
    for path in artifacts:
        if only in path.name:
            calls[path.name] = whole(path)
    return calls


def of_floats(kind: str, problem: Any, target: Any) -> Call:
    """A call of a kernel on drawn floats."""
    form, rng = templates.TEMPLATES[kind], np.random.default_rng(0)
    library = tvm.compile(tvm.IRModule({"kernel": form.build(problem, target, "kernel")}), target=target.target())
    shapes = [[1 if d == "B" else d for d in a.shape] for a in form.arguments(problem, target)]
    tensors = [tvm.runtime.tensor(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
    function = library["kernel"]
    return lambda: function(*tensors)


class _Value(ctypes.Structure):
    """As TVM lays one out."""

    _fields_ = (("type", ctypes.c_int32), ("padding", ctypes.c_uint32), ("number", ctypes.c_int64))


@functools.cache
def pool() -> ctypes.CDLL:
    """The threads of artifacts, which kernels that are compiled from now on in this process call for their loops."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(compile_pool(targets.resolve("native"), Path(folder, "pool.so"), "-shared")))
    use_threads(library, 1)
    launch = ctypes.c_void_p.in_dll(library, "__TVMBackendParallelLaunch")
    name = b"__TVMBackendParallelLaunch"
    if ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi()).TVMFFIEnvModRegisterContextSymbol(name, launch):
        raise AssertionError("TVM does not take the pool")
    return library


def use_threads(library: ctypes.CDLL, count: int) -> None:
    result = _Value()
    library["__tvm_ffi_mpq_use_threads"](None, ctypes.byref(_Value(1, 0, count)), 1, ctypes.byref(result))
    if result.number:
        raise OSError(result.number, os.strerror(result.number))


def on(threads: int, call: Call) -> Call:
    def run() -> None:
        use_threads(pool(), threads)
        call()

    return run


def whole(path: Path) -> tuple[Call, Call]:
    """A step of an artifact at batch 1, with everything computed, on one thread and on two: of the same memory."""
    loaded, rng = compiled_denoiser.load(path, 2, reuse_bytes=0), np.random.default_rng(0)
    machine = loaded.executor
    assert isinstance(machine, VirtualMachine)
    described = loaded.manifest["functions"][0]["inputs"]
    inputs = {
        v["name"]: rng.standard_normal((1, *v["shape"][1:])).astype(np.float32)
        if v["dtype"] == "float32"
        else np.full((1,), 5, v["dtype"])
        for v in described
    }
    out = np.empty_like(loaded.run(inputs))

    def on(threads: int) -> None:
        machine.threads = threads
        loaded.run(inputs, out=out)

    return partial(on, 1), partial(on, 2)


def warm(call: Call, repeats: int) -> float:
    """As in a loop over steps: threads are awake, and each has its share of the weights in its cache."""
    call()
    return wall(call, repeats)


def row(name: str, one: Call, two: Call, control: tuple[Call, Call], budget: float) -> dict[str, Any]:
    """The windows of one subject."""
    for call in (one, two, one):
        call()
    repeats = max(1, int(WINDOW / min(wall(one) for _ in range(3))))
    windows: list[tuple[float, float, float]] = []
    tried, end = 0, time.monotonic() + budget
    while len(windows) < MOST and time.monotonic() < end:
        tried += 1
        before = wall(control[0]) / wall(control[1])
        if before < VALID:
            continue
        took = warm(one, repeats), warm(two, repeats)
        after = wall(control[0]) / wall(control[1])
        if after >= VALID:
            windows.append((*took, (before + after) / 2))
    found: dict[str, Any] = {"name": name, "tried": tried, "windows": len(windows)}
    if len(windows) >= LEAST:
        kept = [a / b / scale for a, b, scale in windows]
        found |= {
            "one_us": 1e6 * statistics.median(a for a, _, _ in windows),
            "two_us": 1e6 * statistics.median(b for _, b, _ in windows),
            "scaling": statistics.median(a / b for a, b, _ in windows),
            "control": statistics.median(scale for _, _, scale in windows),
            "kept": statistics.median(kept),
            "spread": [min(kept), max(kept)],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [name for name in ISAS if name.startswith("x86")]
    parser.add_argument("--isa", default="x86-64-avx512vnni", choices=names)
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="a whole model; may be repeated")
    parser.add_argument("--only", default="", help="measure what contains this in its name")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a row, at most")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = isa(options.isa)
    pool()
    peak.ROUNDS = 60_000  # a fifth of a millisecond a thread
    busy, _ = peak.integer(target, parts=2)
    control = on(1, busy), on(2, busy)
    rows = []
    for name, (one, two) in subjects(options.only, options.artifact, target).items():
        found = row(name, one, two, control, options.seconds)
        rows.append(found)
        text = f"NOT MEASURED: {found['windows']} of {found['tried']} windows count, {LEAST} are needed"
        if "kept" in found:
            verdict = "" if found["kept"] >= GOAL else f", below {GOAL}"
            text = (
                f"{found['one_us']:9.1f} -> {found['two_us']:9.1f} us  x{found['scaling']:.2f}, "
                f"control x{found['control']:.2f}: kept {found['kept']:.2f}{verdict}  ({found['windows']} windows)"
            )
        print(f"{name:32s} {text}", flush=True)
    if options.json:
        report = {**provenance(), "isa": target.name, "valid": VALID, "goal": GOAL, "seconds": options.seconds}
        options.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
