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
import importlib
import importlib.util
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler import artifact as artifacts
from mpq_compiler import contestants, gpu, peers, runtime, svg, terminal
from mpq_compiler import latency_table as tables
from mpq_compiler.contestants import Arrays, Contestant
from mpq_compiler.errors import UserError
from mpq_compiler.latency_table import Table
from mpq_compiler.machine import cpu
from mpq_compiler.metrics import sqnr_db
from mpq_compiler.svg import Point
from mpq_compiler.tvm_runtime import VirtualMachine

OURS, CONTROL, REUSING = "mpq", "mpq control", "mpq reusing"
WINDOW = 8e-3
"""Seconds that a turn takes at the least: shorter calls are repeated."""
GAIN = 0.02
"""Share of a layer's time from which on another format counts as faster: less is noise."""
SHOWN = 20
"""Layers that are told of, of those that would be faster otherwise."""
COPIED = 64 << 20
"""Bytes of the copy that the memory's bandwidth is measured with: more than caches hold."""


@dataclass
class Times:
    """Seconds a call in each round, by both clocks."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def of(self, clock: str) -> list[float]:
        return self.cpu if clock == "cpu" else self.wall


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
    peers.chosen(against)
    check(threads, batch, rounds)
    if against and batch > (most := math.prod(peers.JUDGED)):
        raise UserError(f"--batch {batch} must be {most} or less with --against: quality is judged on {most} inputs")
    loaded = [runtime.load(path, threads, reuse_bytes=0) for path in paths]
    subject = loaded[0]
    times_of = None if latency_table is None else _latency_table(latency_table, subject, threads, batch)
    inputs = contestants.random_inputs(subject.manifest, batch)
    for path, other in zip(paths, loaded, strict=True):
        if other.input_names != subject.input_names:
            raise UserError(f"'{path}' takes {', '.join(other.input_names)}, and the first artifact something else")
    names = names_of(paths)
    entries = [
        contestants.of_artifact(path, compiled, inputs, name)
        for path, compiled, name in zip(paths, loaded, names, strict=True)
    ]
    again = runtime.load(paths[0], threads, reuse_bytes=0)
    entries.insert(1, Contestant(CONTROL, functools.partial(again.run, inputs)))
    if subject.manifest.get("parts"):
        reusing = runtime.load(paths[0], threads)
        entries.insert(2, Contestant(REUSING, functools.partial(reusing.run, inputs)))
    on_gpu = gpu.is_for(subject.manifest)
    if on_gpu and against:
        raise UserError(f"peers run on the CPU, and {paths[0]} on a GPU; leave --against out")
    clock = "cpu" if threads == 1 and not on_gpu else "wall"
    source = peers.source_of(model, subject.manifest) if against else ""
    with tempfile.TemporaryDirectory(prefix="mpq-") as scratch, peers.torch_threads(threads, bool(against)):
        others, skipped, float_model = peers.contestants(against, source, inputs, threads, Path(scratch), progress)
        machine = _machine(subject.manifest)
        calls = {c.name: c.call for c in (*entries, *others, *machine.loops)}
        profiles: list[list[Any]] = []
        if kernels:
            _require_kernels(subject, batch)
        with progress("benchmark", rounds) if progress else nullcontext(lambda n: None) as advance:
            times = {name: Times() for name in calls}
            repeats = {name: _repeats(call) for name, call in calls.items()}
            for index in range(rounds):
                order = list(calls) if index % 2 == 0 else list(calls)[::-1]  # what drifts meets both directions
                for name in order:
                    _turn(calls[name], repeats[name], times[name])
                if kernels:
                    profiles.append(profile(subject, inputs))
                advance(1)
        peaks = contestants.peak_memory([*entries, *others], batch, threads) if memory else {}
        judged = [*zip(names, (c.run for c in loaded), strict=True), *((c.name, c.call) for c in others)]
        quality = {} if float_model is None else _quality(float_model, judged)
    rows = _rows([*entries, *others], times, clock, peaks)
    for row in rows:
        row["sqnr_db"] = quality.get(row["name"])
    peak = machine.figures(times, clock)
    macs = batch * sum(row["macs"] for row in _schedule(subject))
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


def _quality(model: peers.Model, judged: Sequence[tuple[str, Callable[[Arrays], np.ndarray]]]) -> dict[str, float]:
    """SQNR of everybody's output against the float model's, on inputs that none was calibrated on."""
    rows = model.recorded(*peers.JUDGED, seed=1)
    exact = peers.load("torch-fp32", model.source, model.inputs, 1, model.denoiser)
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

    loops: tuple[Contestant, ...]
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
    loops = [Contestant("peak copy", lambda: np.copyto(target, source))]
    work: dict[str, float] = {"peak copy": 2.0 * COPIED}  # it reads and it writes
    reason = None
    if manifest["target"]["backend"] != "tvm":
        reason = "an artifact for another runtime has no kernels of ours to hold against a peak"
    elif gpu.is_for(manifest):
        reason = "the peaks of a GPU are not measured"
    elif importlib.util.find_spec("tvm") is None:
        reason = "the peaks are compiled here, which needs TVM's compiler: pip install 'mpq-compiler[compile]'"
    else:
        peak = importlib.import_module("mpq_compiler.backends.tvm.peak")
        isa = importlib.import_module("mpq_compiler.backends.tvm.kernels.isa").isa(manifest["target"]["name"])
        for name, make in (("peak integer", peak.integer), ("peak float", peak.floating)):
            call, macs = make(isa)
            loops.append(Contestant(name, call))
            work[name] = macs
    return Machine(tuple(loops), work, reason)


# --- measuring ----------------------------------------------------------------------------------------------


def _repeats(call: Callable[[], object]) -> int:
    call()
    start = time.perf_counter()
    call()
    return max(1, int(WINDOW / max(time.perf_counter() - start, 1e-7)))


def _turn(call: Callable[[], object], repeats: int, times: Times) -> None:
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    times.cpu.append((time.process_time() - used) / repeats)
    times.wall.append((time.perf_counter() - wall) / repeats)


def _rows(
    entries: Sequence[Contestant], times: Mapping[str, Times], clock: str, peaks: Mapping[str, int | None]
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


# --- kernels ------------------------------------------------------------------------------------------------


def _schedule(compiled: runtime.CompiledDenoiser) -> list[dict[str, Any]]:
    if artifacts.SCHEDULE not in compiled.manifest["files"]:
        return []
    return json.loads(compiled.artifact.file(artifacts.SCHEDULE).read_text(encoding="utf-8"))


def _require_kernels(compiled: runtime.CompiledDenoiser, batch: int) -> None:
    if compiled.manifest["target"]["backend"] != "tvm" or not _schedule(compiled):
        raise UserError(f"{compiled.artifact.path} has no kernels that could be timed; leave --kernels and --plot out")
    if gpu.is_for(compiled.manifest):
        raise UserError(
            f"the kernels of {compiled.artifact.path} are launched as one graph, which NVIDIA's nsys takes apart; "
            "leave --kernels and --plot out"
        )
    sizes = sorted({f["batch"] for f in compiled.manifest["functions"]})
    if batch not in sizes:
        known = ", ".join(map(str, sizes))
        raise UserError(f"--kernels times one function, and there is none for a batch of {batch}: take {known}")


def profile(compiled: runtime.CompiledDenoiser, inputs: Arrays) -> list[tuple[str, float, float, int]]:
    """(kernel, CPU seconds, seconds, bytes of its operands) of each kernel call of a run that knows nothing, in order.

    A part that runs for several samples counts as one call of each of its kernels.
    """
    batch = len(next(iter(inputs.values())))
    function = next(f for f in compiled.manifest["functions"] if f["batch"] == batch)
    known = frozenset(row["kernel"] for row in _schedule(compiled))
    machine = compiled._executor
    assert isinstance(machine, VirtualMachine), "only TVM's machine knows single kernels"
    machine.forget()
    before = {name: part.computed for name, part in machine.parts.items()}
    timed = iter(machine.profile(function["name"], [inputs[value["name"]] for value in function["inputs"]], known))
    runs = {name: part.computed - before[name] for name, part in machine.parts.items()}
    found: list[tuple[str, float, float, int]] = []
    for part, rows in itertools.groupby(_schedule(compiled), lambda row: row.get("part")):
        count = len(list(rows))
        each = [[next(timed) for _ in range(count)] for _ in range(runs.get(str(part), 1))]
        for calls in zip(*each, strict=True):
            names, used, wall, size = zip(*calls, strict=True)
            found.append((names[0], sum(used), sum(wall), sum(size)))
    return found


def _kernel_rows(
    compiled: runtime.CompiledDenoiser, profiles: Sequence[Sequence[Any]], batch: int, clock: str, peak: float | None
) -> list[dict[str, Any]]:
    column = 1 if clock == "cpu" else 2
    rows = []
    for index, call in enumerate(_schedule(compiled)):
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


def _latency_table(path: str | Path, subject: runtime.CompiledDenoiser, threads: int, batch: int) -> Table:
    """The table in a file. UserError: it does not hold for what is measured here."""
    table = tables.load(path)
    tables.require_of(table, subject.manifest["target"]["name"], cpu(), threads)
    if table.batch != batch:
        raise UserError(f"the latency table (--latency-table) is of batch {table.batch}: add --batch {table.batch}")
    _require_kernels(subject, batch)
    return table


def _latency(
    subject: runtime.CompiledDenoiser, table: Table | None, threads: int, batch: int, measured: float
) -> dict[str, Any] | None:
    """Predicted against measured time, by the table or by what the artifact was compiled with; and faster formats."""
    if table is None:
        known = subject.manifest.get("plan", {}).get("latency")
        if known is None or (known["cpu"], known["threads"], known["batch"]) != (cpu(), threads, batch):
            return None
        return _against(known["predicted_ms"], measured) | {"missing": known["missing"], "layers": None}
    rows = _schedule(subject)
    if any("problem" not in row for row in rows):
        raise UserError(f"{subject.artifact.path} does not say what its kernels compute: compile it again")
    found = tables.predict(table, [row["problem"] for row in rows])
    others = tables.others_of(table)
    layers = [layer for row in rows if (layer := _faster(row, others)) is not None]
    layers.sort(key=lambda layer: layer["best_ms"] - layer["ms"])
    return _against(found.ms, measured) | {"missing": len(found.missing), "layers": layers}


def _against(predicted: float, measured: float) -> dict[str, Any]:
    return {"predicted_ms": predicted, "measured_ms": measured, "error": predicted / measured - 1}


def _faster(row: Mapping[str, Any], others: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """A layer beside its fastest format in the table; None where none gains anything, or nothing is known."""
    times = others.get(tables.in_any_format(row["problem"]) or "", {})
    own = tables.format_of(row["problem"]) or ""
    if own not in times:
        return None
    best = min(times, key=times.__getitem__)
    if times[best] > times[own] * (1 - GAIN):
        return None
    layer = row["layer"] or row["node"]
    return {"layer": layer, "weights": own, "ms": times[own] / 1e3, "best": best, "best_ms": times[best] / 1e3}


# --- for reading --------------------------------------------------------------------------------------------


def show(found: Mapping[str, Any], kernels: bool) -> None:
    """Prints the result."""
    ours = found["rows"][0]
    clock = "CPU" if found["clock"] == "cpu" else "wall"
    terminal.table(
        f"{found['cpu']}: batch {found['batch']}, {found['threads']} thread(s), {found['rounds']} rounds, {clock} time",
        ("", "ms", "least", "most", "stored", "peak memory", "SQNR", f"against {ours['name']}", "80 % within"),
        [
            (
                row["name"],
                *(f"{row[key]:.3f}" for key in ("ms", "ms_min", "ms_max")),
                "" if row["bytes"] is None else terminal.size(row["bytes"]),
                "" if row["peak_bytes"] is None else terminal.size(row["peak_bytes"]),
                "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB",
                "" if row is ours else f"{ours['speedup'][row['name']]:.2f} x",
                "" if row is ours else "{:.2f} .. {:.2f}".format(*ours["spread"][row["name"]]),
            )
            for row in found["rows"]
        ],
        numeric=range(1, 8),
    )
    if any(row["name"] == REUSING for row in found["rows"]):
        terminal.say(
            f"'{OURS}' computes everything in every call; '{REUSING}' knows what depends on timesteps and texts alone, "
            "as a sampler does from its second image on (of texts: from the second step on)"
        )
    for name, reason in found["skipped"].items():
        terminal.say(f"skipped {name}: {reason}")
    peak = found["peak"]
    if peak["gmacs"]:
        reached = f"; the model runs at {peak['model_gmacs']:.0f}, {100 * peak['reached']:.0f} % of it"
        terminal.say(
            f"one core does {peak['gmacs']:.0f} GMAC/s of 8-bit integers and {peak['float_gmacs']:.0f} of f32 at most, "
            f"and copies {peak['gbytes']:.1f} GB/s{reached if peak['reached'] else ''}"
        )
    elif peak["reason"]:
        terminal.note(f"no peak: {peak['reason']}")
    if found["latency"] is not None:
        _show_latency(found["latency"])
    if kernels:
        _show_kernels(found["kernels"])


def _show_latency(found: Mapping[str, Any]) -> None:
    beyond = f"; the table lacks {found['missing']} of the kernel calls" if found["missing"] else ""
    terminal.say(
        f"predicted {found['predicted_ms']:.4g} ms, measured {found['measured_ms']:.4g} ms: "
        f"{100 * found['error']:+.1f} %{beyond}"
    )
    if found["layers"] is None:
        return
    saved = sum(row["ms"] - row["best_ms"] for row in found["layers"])
    terminal.table(
        f"layers that would be faster with other weights, by {saved:.4f} ms in all",
        ("layer", "weights", "ms", "faster with", "ms", "saves"),
        [
            (
                row["layer"].removesuffix(".weight"),
                row["weights"],
                f"{row['ms']:.4f}",
                row["best"],
                f"{row['best_ms']:.4f}",
                f"{100 * (1 - row['best_ms'] / row['ms']):.1f} %",
            )
            for row in found["layers"][:SHOWN]
        ],
        numeric=(2, 4, 5),
    )


def _show_kernels(rows: Sequence[Mapping[str, Any]]) -> None:
    families: dict[str, list[float]] = {}
    for row in rows:
        families.setdefault(row["template"], []).append(row["ms"])
    parts: dict[str, list[float]] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row["ms"])
    total = sum(row["ms"] for row in rows)
    terminal.table(
        "kernels",
        ("layer or node", "kernel", "weights", "ms", "share", "operands", "GMAC/s", "of the peak"),
        [
            (
                (row["layer"] or row["node"]).removesuffix(".weight"),
                row["template"],
                row["weights"] or "",
                f"{row['ms']:.4f}",
                f"{100 * row['share']:.1f} %",
                terminal.size(row["bytes"]),
                "" if row["gmacs"] is None else f"{row['gmacs']:.1f}",
                "" if row["reached"] is None else f"{100 * row['reached']:.0f} %",
            )
            for row in rows
        ],
        numeric=range(3, 8),
    )
    terminal.table(
        f"families, {total:.3f} ms in all",
        ("kernel", "calls", "ms", "share"),
        [
            (name, len(times), f"{sum(times):.4f}", f"{100 * sum(times) / total:.1f} %")
            for name, times in sorted(families.items(), key=lambda item: -sum(item[1]))
        ],
        numeric=(1, 2, 3),
    )
    if len(parts) > 1:
        terminal.table(
            "what is computed in every step, and what once for each timestep or text",
            ("part", "calls", "ms", "share"),
            [
                (name, len(times), f"{sum(times):.4f}", f"{100 * sum(times) / total:.1f} %")
                for name, times in parts.items()
            ],
            numeric=(1, 2, 3),
        )


def roofline(found: Mapping[str, Any]) -> str:
    """The kernels that multiply under the roofs of this machine, as SVG: GMAC/s over MACs a byte of operands."""
    rows = [row for row in found["kernels"] if row["macs"] and row["bytes"]]
    families = sorted({row["template"] for row in rows})
    points = [
        Point(
            row["macs"] / row["bytes"],
            row["gmacs"],
            f"{row['layer'] or row['node']}: {row['ms']:.4f} ms, {row['gmacs']:.1f} GMAC/s",
            families.index(row["template"]),
        )
        for row in rows
    ]
    peak = found["peak"]
    xs = [p.x for p in points] or [1.0]
    roofs = {}
    for name, top in (("8-bit integers", peak["gmacs"]), ("f32", peak["float_gmacs"])):
        if top:
            knee = top / peak["gbytes"]
            first, last = min([*xs, knee]) / 2, max([*xs, knee]) * 2
            roofs[name] = [(first, first * peak["gbytes"]), (knee, top), (last, top)]
    return svg.log_log(points, roofs, "roofline", ("multiply-accumulates for each byte", "GMAC/s"), families)
