"""What is not computed and not moved: parts kept between steps, concatenations that are read or written in place.

    python -m benchmarks.movement [--model fashion-text] [--model unet-70m] [--runs 3] [--rounds 9] [--folder DIR]

One thread, CPU time, everything interleaved; medians over the rounds, then over the runs, with least and most. Of each
model (8-bit weights) two artifacts run: as compiled, and without the stages that join calls
(`backends/tvm/plan/stages.py`), where concatenations are copies and quantizers kernels of their own. *Reusing* is the
artifact when the timestep and the texts are known from an earlier call (docs/artifact.md), against a call that computes
everything. Below, what a concatenation of two tensors costs, against a copy of the same bytes (the goal: never more) in
the two ways of an artifact: a group norm that reads two tensors in place of one; a layer norm that writes to a part of
a buffer in place of a tensor. They are differences of two measurements and may be negative. Beside them a kernel that
copies, which is what is left where neither is possible (a note of `mpqc compile`), and its speed as a share of that of
a copy.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TVM_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tvm

from benchmarks import end_to_end
from benchmarks.machine import provenance
from benchmarks.timing import interleaved
from mpq_compiler.api import compile
from mpq_compiler.backends.tvm.kernels.cpu import movement, norms
from mpq_compiler.backends.tvm.kernels.problems import movement as movement_problems
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm
from mpq_compiler.backends.tvm.plan import stages
from mpq_compiler.backends.tvm.plan.calls import Function
from mpq_compiler.latency import timing
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support import terminal
from mpq_compiler.support.tensorfile import aligned_empty
from mpq_compiler.targets import table as targets

RESULTS = Path(__file__).parent / "results" / "movement.json"
SHAPES = ((4096, 320), (1024, 640), (256, 1280), (1024, 128), (256, 256), (64, 512))
"""Positions and channels of each of the two tensors: the skip connections of U-Nets."""
MOVING = ("movement", "quantize", "norms")
WAYS = ("read_in_parts_us", "written_in_place_us")
"""How artifacts concatenate (`backends/tvm/plan/stages.py`)."""


def artifact(source: str, folder: Path, fused: bool) -> Path:
    """The model with 8-bit weights, with the rules or without."""
    path = folder / f"{Path(source).name}-{'fused' if fused else 'single'}" / "model.mpq"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen: dict[str, Any] = {"recipe": "w8a8", "samples": 4, "steps": 4}
        if fused:
            compile.compile(source, path, **chosen)
        else:
            with ExitStack() as stack:
                for stage in (*stages.JOINING[:-1], stages.ConcatenateInPlace):
                    stack.enter_context(mock.patch.object(stage, "changed", unchanged))
                compile.compile(source, path, **chosen)
    return path


def unchanged(stage: object, function: Function) -> Function:
    """In place of what a stage does."""
    return function


def artifacts(name: str, folder: Path) -> dict[str, Path]:
    source = end_to_end.save(name, folder) if name in end_to_end.MODELS else name
    return {kind: artifact(source, folder, kind == "fused") for kind in ("fused", "single")}


def of_model(name: str, paths: Mapping[str, Path], rounds: int) -> dict[str, Any]:
    """Milliseconds of a step by kernel family with the rules and without; of a whole call, reusing or not."""
    cold = {kind: compiled_denoiser.load(path, 1, reuse_bytes=0) for kind, path in paths.items()}
    reusing = compiled_denoiser.load(paths["fused"], 1)
    inputs = timing.random_inputs(reusing.manifest, 1)
    loaded = {**cold, "fused, reusing": reusing}
    calls = {kind: functools.partial(compiled.run, inputs) for kind, compiled in loaded.items()}
    times: dict[str, list[float]] = defaultdict(list)
    families: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in cold}
    parts: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for kind, call in calls.items():
            times[kind].append(seconds(call, 4))
        for kind, compiled in cold.items():
            sums: dict[str, float] = defaultdict(float)
            by_part: dict[str, float] = defaultdict(float)
            profile = timing.profile(compiled, inputs)
            for row, (_, used, _, _) in zip(timing.kernel_calls(compiled), profile, strict=True):
                sums[row["template"]] += used
                by_part[row["part"]] += used
            for family, used in sums.items():
                families[kind][family].append(used)
            if kind == "fused":
                for part, used in by_part.items():
                    parts[part].append(used)
    kept = {
        key: {"row_bytes": part.row_bytes, "rows": part.rows, "reserved_bytes": part.reserved_bytes}
        for key, part in reusing.executor.parts.items()  # type: ignore[attr-defined]
    }
    return {
        "model": name,
        "ms": {kind: median(values) for kind, values in times.items()},
        "reusing_speedup": ratio(times["fused"], times["fused, reusing"]),
        "fusing_speedup": ratio(times["single"], times["fused"]),
        "kernels_ms": {kind: {f: median(v) for f, v in sums.items()} for kind, sums in families.items()},
        "calls": {kind: len(timing.kernel_calls(compiled)) for kind, compiled in cold.items()},
        "parts_ms": {part: median(values) for part, values in parts.items()},
        "kept": kept,
    }


def seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


def median(values: Sequence[float]) -> float:
    """In milliseconds."""
    return round(1e3 * statistics.median(values), 4)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median ratio within rounds."""
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 4)


def kernels(positions: int, channels: int) -> Mapping[str, Callable[[], object]]:
    """The kernels whose times make up the costs of a concatenation of two tensors of these channels."""
    target = targets.resolve("native")
    both, rows = 2 * channels, (BATCH, positions)
    whole = GroupNorm(positions, both, 32)
    row = LayerNorm(positions, channels)
    problems: dict[str, Any] = {
        "concat": movement_problems.concat([(*rows, channels)] * 2, 2),
        "norm": whole,
        "norm of parts": replace(whole, parts=(channels, channels)),
        "row norm": row,
        "row norm in place": replace(row, into=(positions * both, channels, both)),
    }
    found: dict[str, Callable[[], object]] = {}
    for name, problem in problems.items():
        module = movement if name == "concat" else norms
        function = module.build(problem, target.isa or "", "f")
        library = tvm.compile(tvm.IRModule({"f": function}), target=tvm.target.Target(dict(target.tvm)))["f"]
        buffers = [filled(argument) for argument in module.arguments(problem)]
        found[name] = functools.partial(library, *buffers)
    source, copied = (aligned_empty((positions * both,), np.dtype(np.float32)) for _ in range(2))
    source[...] = copied[...] = 1
    found["copy"] = functools.partial(np.copyto, copied, source)
    return found


def filled(argument: Argument) -> Any:
    shape = tuple(1 if extent == BATCH else int(extent) for extent in argument.shape)
    array = aligned_empty(shape, np.dtype(argument.dtype))
    array[...] = np.random.default_rng(0).standard_normal(shape)
    return tvm.runtime.from_dlpack(array)


def of_shape(positions: int, channels: int, rounds: int) -> dict[str, float]:
    """Microseconds that a concatenation costs, each way, and how many times the kernel's time a copy takes."""
    times = interleaved(kernels(positions, channels), rounds, warm=True)

    def cost(name: str, without: str = "") -> float:
        base = times[without] if without else [0.0] * rounds
        return round(1e6 * statistics.median(a - b for a, b in zip(times[name], base, strict=True)), 2)

    return {
        "copy_us": cost("copy"),
        "kernel_us": cost("concat"),
        "read_in_parts_us": cost("norm of parts", "norm"),
        "written_in_place_us": cost("row norm in place", "row norm"),
        "of_copy": ratio(times["copy"], times["concat"]),
    }


def over(found: Sequence[Any]) -> Any:
    """What the runs have found as one: numbers as their median, with [least, most] beside where they differ."""
    if isinstance(found[0], dict):
        return {key: over([each[key] for each in found]) for key in found[0]}
    if isinstance(found[0], float):
        return {"median": round(statistics.median(found), 4), "spread": [min(found), max(found)]}
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help=f"a bundled model, or {', '.join(end_to_end.MODELS)}")
    parser.add_argument("--runs", type=int, default=3, help="each measures everything (default 3)")
    parser.add_argument("--rounds", type=int, default=9, help="of a run (default 9)")
    parser.add_argument("--folder", type=Path, help="keeps models and artifacts")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    shapes = []
    for shape in SHAPES:
        found = over([of_shape(*shape, options.rounds) for _ in range(options.runs)])
        met = all(found[way]["median"] <= found["copy_us"]["median"] for way in WAYS)
        shapes.append({"positions": shape[0], "channels": shape[1], **found, "met": met})
    columns = ("copy_us", *WAYS, "kernel_us", "of_copy")
    terminal.table(
        "a concatenation of two tensors, us",
        ("each", "a copy", "read in parts", "written in place", "met", "a kernel that copies", "as fast as a copy"),
        [
            (f"{s['positions']} x {s['channels']}", *(f"{s[k]['median']:.2f}" for k in columns[:3]),
             "yes" if s["met"] else "NO", *(f"{s[k]['median']:.2f}" for k in columns[3:]))
            for s in shapes
        ],
        numeric=(1, 2, 3, 5, 6),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mpq-") as scratch:
        folder = options.folder or Path(scratch)
        made = {name: artifacts(name, folder) for name in options.model or ("fashion-text", "unet-70m")}
        runs = [
            {name: of_model(name, paths, options.rounds) for name, paths in made.items()} for _ in range(options.runs)
        ]
    models = [over([run[name] for run in runs]) for name in made]
    for found in models:
        fused, single = (found["kernels_ms"][kind] for kind in ("fused", "single"))

        def ms(of: Mapping[str, Any], key: str) -> float | str:
            return of[key]["median"] if key in of else 0.0

        terminal.table(
            f"{found['model']}: ms a step on one thread",
            ("", "with the rules", "without"),
            [
                ("a call", ms(found["ms"], "fused"), ms(found["ms"], "single")),
                ("a call, timestep and texts known", ms(found["ms"], "fused, reusing"), ""),
                *((f"kernels: {family}", ms(fused, family), ms(single, family)) for family in MOVING),
                ("kernel calls", found["calls"]["fused"], found["calls"]["single"]),
                *((f"part '{part}'", of["median"], "") for part, of in found["parts_ms"].items()),
            ],
            numeric=(1, 2),
        )
    record = {**provenance(), "runs": options.runs, "rounds": options.rounds, "models": models, "shapes": shapes}
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
