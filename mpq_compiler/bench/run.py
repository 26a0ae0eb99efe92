"""`mpqc bench`: artifacts against torch, onnxruntime and OpenVINO on this machine, whole and kernel by kernel.

Everything that is compared takes turns, in rounds, so that what else the machine does meets all alike; ratios are
those within a round. The first artifact runs twice under two names: what that control differs by is noise. Artifacts
compute everything in every call, as peers do; what a sampler saves because timesteps and texts come again stands in a
row of its own, ``mpq reusing`` (docs/artifact.md). CPU time of the process is what counts on one thread, for it leaves
out what others do; with more threads it is the wall clock.

Without peers nothing here imports torch, and without TVM's compiler only the peaks of the machine are missing.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.bench import baselines
from mpq_compiler.bench import memory as bench_memory
from mpq_compiler.bench import subject as bench_subject
from mpq_compiler.bench.show import CONTROL, OURS, REUSING, faster
from mpq_compiler.bench.subject import Subject
from mpq_compiler.evaluation.metrics import sqnr_db
from mpq_compiler.latency import table as tables
from mpq_compiler.latency import timing
from mpq_compiler.latency.table import Table
from mpq_compiler.latency.timing import Arrays, Times, kernel_calls, profile, repeats, require_timed_kernels, turn
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.host import cpu
from mpq_compiler.targets import nvidia

COPIED = 64 << 20
"""Bytes of the copy that the memory's bandwidth is measured with: more than caches hold."""


def bench(
    paths: Sequence[str | Path],
    against: Sequence[str] = (),
    model: str | None = None,
    threads: int = 1,
    batch: int = 1,
    rounds: int = 15,
    kernels: bool = False,
    memory: bool = True,
    progress: Any = None,
    latency_table: str | Path | None = None,
) -> dict[str, Any]:
    """Measures and returns plain data (schemas/bench.json).

    paths: artifacts of one model; the first is the one whose kernels are looked at. model: the float model that the
    peers run, where the artifact's is no bundled one. latency_table: of `mpqc latency`, to hold the first artifact
    against. UserError: fewer than one round, thread or sample, an unknown
    peer, an artifact that this machine cannot run, or that is of another model.
    """
    baselines.chosen(against)
    check(threads, batch, rounds)
    if against and batch > (most := math.prod(baselines.JUDGED)):
        raise UserError(f"--batch {batch} must be {most} or less with --against: quality is judged on {most} inputs")
    loaded = [compiled_denoiser.load(path, threads, reuse_bytes=0) for path in paths]
    subject = loaded[0]
    times_of = None if latency_table is None else _latency_table(latency_table, subject, threads, batch)
    inputs = timing.random_inputs(subject.manifest, batch)
    for path, other in zip(paths, loaded, strict=True):
        if other.input_names != subject.input_names:
            raise UserError(f"'{path}' takes {', '.join(other.input_names)}, and the first artifact something else")
    names = names_of(paths)
    entries = [
        bench_subject.of_artifact(path, compiled, inputs, name)
        for path, compiled, name in zip(paths, loaded, names, strict=True)
    ]
    again = compiled_denoiser.load(paths[0], threads, reuse_bytes=0)
    entries.insert(1, Subject(CONTROL, functools.partial(again.run, inputs)))
    if subject.manifest.get("parts"):
        reusing = compiled_denoiser.load(paths[0], threads)
        entries.insert(2, Subject(REUSING, functools.partial(reusing.run, inputs)))
    on_gpu = nvidia.is_for(subject.manifest)
    if on_gpu and against:
        raise UserError(f"peers run on the CPU, and {paths[0]} on a GPU; leave --against out")
    clock = "cpu" if threads == 1 and not on_gpu else "wall"
    source = baselines.source_of(model, subject.manifest) if against else ""
    with tempfile.TemporaryDirectory(prefix="mpq-") as scratch, baselines.torch_threads(threads, bool(against)):
        others, skipped, float_model = baselines.contestants(against, source, inputs, threads, Path(scratch), progress)
        machine = _machine(subject.manifest)
        calls = {c.name: c.call for c in (*entries, *others, *machine.loops)}
        profiles: list[list[Any]] = []
        if kernels:
            require_timed_kernels(subject, batch)
        with progress("benchmark", rounds) if progress else nullcontext(lambda n: None) as advance:
            times = {name: Times() for name in calls}
            repeats = {name: repeats(call) for name, call in calls.items()}
            for index in range(rounds):
                order = list(calls) if index % 2 == 0 else list(calls)[::-1]  # what drifts meets both directions
                for name in order:
                    turn(calls[name], repeats[name], times[name])
                if kernels:
                    profiles.append(profile(subject, inputs))
                advance(1)
        peaks = bench_memory.peak_memory([*entries, *others], batch, threads) if memory else {}
        judged = [*zip(names, (c.run for c in loaded), strict=True), *((c.name, c.call) for c in others)]
        quality = {} if float_model is None else _quality(float_model, judged)
    rows = _rows([*entries, *others], times, clock, peaks)
    for row in rows:
        row["sqnr_db"] = quality.get(row["name"])
    peak = machine.figures(times, clock)
    macs = batch * sum(row["macs"] for row in kernel_calls(subject))
    seconds = statistics.median(times[OURS].of(clock))
    if macs:
        peak["model_gmacs"] = macs / seconds / 1e9
        peak["reached"] = peak["model_gmacs"] / peak["gmacs"] if peak["gmacs"] else None
    return {
        "rows": rows,
        "peak": peak,
        "rounds": rounds,
        "threads": threads,
        "batch": batch,
        "clock": clock,
        "cpu": cpu(),
        "skipped": skipped,
        "kernels": _kernel_rows(subject, profiles, batch, clock, peak["gmacs"]) if kernels else None,
        "latency": _latency(subject, times_of, threads, batch, rows[0]["ms"]),
    }


def _quality(model: baselines.Model, judged: Sequence[tuple[str, Callable[[Arrays], np.ndarray]]]) -> dict[str, float]:
    """SQNR of everybody's output against the float model's, on inputs that none was calibrated on."""
    rows = model.recorded(*baselines.JUDGED, seed=1)
    exact = baselines.load("torch-fp32", model.source, model.inputs, 1, model.denoiser)
    expected = np.concatenate([exact(row) for row in rows])
    return {name: sqnr_db(expected, np.concatenate([call(row) for row in rows])) for name, call in judged}


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """What rows are called: the first artifact OURS, others by their file, or by the whole path where that is not one's
    own. UserError: a path is given twice.
    """
    stems, found = [Path(path).stem for path in paths[1:]], [OURS]
    for path, stem in zip(paths[1:], stems, strict=True):
        alone = stems.count(stem) == 1 and f"{OURS} {stem}" not in (CONTROL, REUSING)
        name = f"{OURS} {stem if alone else path}"
        if name in found:
            raise UserError(f"'{path}' is given twice; '{CONTROL}' is the first artifact once more")
        found.append(name)
    return found


def check(threads: int, batch: int, rounds: int) -> None:
    """UserError: one of them is less than 1."""
    for option, value in (("threads", threads), ("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise UserError(f"--{option} {value} must be 1 or more")


# --- the machine --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Loops that do nothing but one thing, and how much of it a call does."""

    loops: tuple[Subject, ...]
    work: Mapping[str, float]
    reason: str | None

    def figures(self, times: Mapping[str, Times], clock: str) -> dict[str, Any]:
        """The best of all rounds: ``gmacs`` of 8-bit integers and of f32 on one core, ``gbytes`` copied a second."""
        best = {name: self.work[name] / min(times[name].of(clock)) / 1e9 for name in self.work}
        return {
            "gmacs": best.get("peak integer"),
            "float_gmacs": best.get("peak float"),
            "gbytes": best["peak copy"],
            "model_gmacs": None,
            "reached": None,
            "reason": self.reason,
        }


def _machine(manifest: Mapping[str, Any]) -> Machine:
    source = np.zeros(COPIED // 8)
    target = np.zeros_like(source)
    loops = [Subject("peak copy", lambda: np.copyto(target, source))]
    work: dict[str, float] = {"peak copy": 2.0 * COPIED}  # it reads and it writes
    reason = None
    if manifest["target"]["backend"] != "tvm":
        reason = "an artifact for another runtime has no kernels of ours to hold against a peak"
    elif nvidia.is_for(manifest):
        reason = "the peaks of a GPU are not measured"
    elif importlib.util.find_spec("tvm") is None:
        reason = "the peaks are compiled here, which needs TVM's compiler: pip install 'mpq-compiler[compile]'"
    else:
        from mpq_compiler.backends.tvm.compile import peak
        from mpq_compiler.backends.tvm.kernels.cpu.isa import isa

        family = isa(manifest["target"]["name"])
        for name, make in (("peak integer", peak.integer), ("peak float", peak.floating)):
            call, macs = make(family)
            loops.append(Subject(name, call))
            work[name] = macs
    return Machine(tuple(loops), work, reason)


def _rows(
    entries: Sequence[Subject], times: Mapping[str, Times], clock: str, peaks: Mapping[str, int | None]
) -> list[dict[str, Any]]:
    rows = []
    for entry in entries:
        own = times[entry.name].of(clock)
        ratios = {
            other.name: [b / a for a, b in zip(own, times[other.name].of(clock), strict=True)]
            for other in entries
            if other.name != entry.name
        }
        rows.append(
            {
                "name": entry.name,
                "ms": 1e3 * statistics.median(own),
                "ms_min": 1e3 * min(own),
                "ms_max": 1e3 * max(own),
                "cpu_ms": 1e3 * statistics.median(times[entry.name].cpu),
                "wall_ms": 1e3 * statistics.median(times[entry.name].wall),
                "bytes": entry.bytes,
                "peak_bytes": peaks.get(entry.name),
                "speedup": {name: statistics.median(values) for name, values in ratios.items()},
                "spread": {name: middle(values) for name, values in ratios.items()},
            }
        )
    return rows


def middle(values: Sequence[float]) -> list[float]:
    """The range of the middle eight tenths."""
    return [float(np.quantile(values, q)) for q in (0.1, 0.9)]


def _kernel_rows(
    compiled: CompiledDenoiser, profiles: Sequence[Sequence[Any]], batch: int, clock: str, peak: float | None
) -> list[dict[str, Any]]:
    column = 1 if clock == "cpu" else 2
    rows = []
    for index, call in enumerate(kernel_calls(compiled)):
        times = [run[index][column] for run in profiles]
        seconds, macs = statistics.median(times), call["macs"] * batch
        gmacs = macs / max(seconds, 1e-9) / 1e9 if macs else None
        rows.append(
            {
                **{key: call[key] for key in ("node", "layer", "kernel", "template")},
                "part": call.get("part", "step"),
                "weights": tables.format_of(call.get("problem", "")),
                "ms": 1e3 * seconds,
                "ms_min": 1e3 * min(times),
                "ms_max": 1e3 * max(times),
                "bytes": profiles[0][index][3],
                "macs": macs,
                "gmacs": gmacs,
                "reached": None if gmacs is None or peak is None else gmacs / peak,
            }
        )
    total = sum(row["ms"] for row in rows)
    return [{**row, "share": row["ms"] / total if total else 0.0} for row in rows]


# --- predictions --------------------------------------------------------------------------------------------


def _latency_table(path: str | Path, subject: compiled_denoiser.CompiledDenoiser, threads: int, batch: int) -> Table:
    """The table in a file. UserError: it does not hold for what is measured here."""
    table = tables.load(path)
    tables.require_of(table, subject.manifest["target"]["name"], cpu(), threads)
    if table.batch != batch:
        raise UserError(f"the latency table (--latency-table) is of batch {table.batch}: add --batch {table.batch}")
    require_timed_kernels(subject, batch)
    return table


def _latency(
    subject: compiled_denoiser.CompiledDenoiser, table: Table | None, threads: int, batch: int, measured: float
) -> dict[str, Any] | None:
    """Predicted against measured time, by the table or by what the artifact was compiled with; and faster formats."""
    if table is None:
        known = subject.manifest.get("plan", {}).get("latency")
        if known is None or (known["cpu"], known["threads"], known["batch"]) != (cpu(), threads, batch):
            return None
        return _against(known["predicted_ms"], measured) | {"missing": known["missing"], "layers": None}
    rows = kernel_calls(subject)
    if any("problem" not in row for row in rows):
        raise UserError(f"{subject.artifact.path} does not say what its kernels compute: compile it again")
    found = tables.predict(table, [row["problem"] for row in rows])
    others = tables.others_of(table)
    layers = [layer for row in rows if (layer := faster(row, others)) is not None]
    layers.sort(key=lambda layer: layer["best_ms"] - layer["ms"])
    return _against(found.ms, measured) | {"missing": len(found.missing), "layers": layers}


def _against(predicted: float, measured: float) -> dict[str, Any]:
    return {"predicted_ms": predicted, "measured_ms": measured, "error": predicted / measured - 1}
