"""Integer GEMMs, convolutions and matrix-vector products: share of the CPU's peak, and against the best peer.

    python -m benchmarks.kernels                                  # all, into benchmarks/results/kernels-ISA.json
    python -m benchmarks.kernels --isa x86-64-avx2 --against ''   # without peers, whose kernels take what the CPU has
    python -m benchmarks.kernels --isa amx                        # tiles, beside our kernels of AVX512-VNNI
    python -m benchmarks.kernels --only 'linear 64x' --runs 1 --json ''

One thread. The kernels of a shape in all formats, its peers (benchmarks/operators.py) and a loop of nothing but dot
products on registers (the peak) take turns, in rounds; figures are medians over the rounds of the process's CPU time,
and medians of those over the runs, with their least and most beside. `peak` is the share of it that the useful
multiply-accumulates reach: padded channels and recomputed rows count as lost. Linear layers read codes and write
floats; convolutions read codes and write codes. Formats: `lut4` has two codebooks that rows choose from, `base+b` a
binary branch (`int2+b`), folded, and offsets. Rows against MatMulNBits, which quantizes what it reads, include that.
Cold matrix-vector products take each call other weights out of several times what the last-level cache holds; their
share is of the speed at which a loop of loads reads as many bytes. Of K-groups with one row, whose weights do not fit
the first caches, `read` is how fast they are against such a loop: no kernel can be faster than it. With tiles (AMX) the
peak is theirs, and goals are times that our kernels for AVX512-VNNI take, the same problems and formats, with codes as
results. Calls beside which the peak was not reached by far, be it this run's or that of the JSON, are made again: the
other thread of the core was at work.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TVM_NUM_THREADS", "1")  # benchmarks/threads.py has 2
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tvm

from benchmarks import documents, operators
from benchmarks.machine import provenance
from benchmarks.timing import interleaved
from mpq_compiler.backends.tvm.compile import peak
from mpq_compiler.backends.tvm.kernels.cpu import gemm, prepare, quantize
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS, Isa, isa
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import WeightLayout
from mpq_compiler.backends.tvm.kernels.problems import quantize as quantize_problems
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Step
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul, stored_arguments
from mpq_compiler.backends.tvm.kernels.problems.quantize import DynamicQuantize
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.harness.shapes import concrete, make_case

Call = Callable[[], object]
RESULTS = Path(__file__).parent / "results"
PEERS = ("torch", "onnxruntime", "openvino")
ROWS, SIZES = (1, 2, 5, 64, 256, 1024), (320, 640, 1280)
SAME: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
REQUANTIZED = Epilogue((Step("quantize", value=8),))
FORMATS: Mapping[str, dict[str, Any]] = {
    "w8": {"bits": 8},
    "w4": {"bits": 4},
    "w3": {"bits": 3},
    "w2": {"bits": 2},
    "lut4": {"bits": 4, "classes": 2},
    "base+b": {"bits": 3, "has_offset": True},
}
GEMM = {"w8": 0.92, "w4": 0.90, "w2": 0.90, "lut4": 0.88, "w3": 0.88, "base+b": 0.88}
"""Shares of the peak at 256 rows and 640 channels or more."""
CONV = {(64, 320): 0.88, (32, 640): 0.88, (16, 1280): 0.82, (8, 1280): None}
AS_W8, NBITS, COLD = 1.05, 2.5, 0.70
REGISTERS = "x86-64-avx512vnni"
"""What tiles are held against."""
TILES_LINEAR, TILES_CONV, TILES_AS_W8 = 3.3, 5.0, 0.9
"""How many times as long registers take, for 64 rows and more; and 8 bits, of 4, 3 and 2 bits, from 256 on."""
QUIET, TURNS = 0.7, 12
"""The share of the best pace so far at which a round counts, and how often rounds are taken before any do."""
READ = "read"
"""The contestant that reads memory and does nothing else."""


@dataclass
class Group:
    """What takes turns.

    work:     multiply-accumulates of a call of ours; of a cold one the bytes that it reads
    goals:    (of ours, what) -> the least; what is ``peak``, ``read``, or a contestant that is to take so many times
              as long
    also:     calls whose time counts to one of ours
    unit:     the contestant that sets the pace
    """

    name: str
    ours: dict[str, Call]
    work: dict[str, float]
    unit: str
    peers: dict[str, Call] = field(default_factory=dict)
    goals: dict[tuple[str, str], float] = field(default_factory=dict)
    also: dict[str, str] = field(default_factory=dict)


def problems() -> dict[str, dict[str, QuantMatmul]]:
    """Groups of problems by the end of their names: shapes of latent-diffusion U-Nets and of the bundled denoiser."""
    table: dict[str, dict[str, QuantMatmul]] = {}
    for rows, size in itertools.product(ROWS, SIZES):
        table[f"linear {rows}x{size}x{size}"] = {
            name: QuantMatmul.linear((rows,), size, size, **options) for name, options in FORMATS.items()
        }
    for side, channels in CONV:
        table[f"conv3x3 {side}x{side}x{channels}"] = {
            name: QuantMatmul(side, side, channels, channels, epilogue=REQUANTIZED, **options, **SAME)
            for name, options in FORMATS.items()
        }
    for side, channels in ((64, 320), (32, 128)):
        table[f"conv_out {side}x{side}x{channels}->4"] = {
            name: QuantMatmul(side, side, channels, 4, **FORMATS[name], **SAME) for name in ("w8", "w4")
        }
    several: dict[str, dict[str, Any]] = {
        "2 segments": {"segments": (320, 320)},
        "4 classes": {"classes": 4},
        "20 time groups": {"groups": 20},
    }
    for kind, options in several.items():
        table[f"linear 256x640x640, {kind},"] = {"w4": QuantMatmul.linear((256,), 640, 640, bits=4, **options)}
    for side, channels, outputs in ((28, 1, 48), (28, 48, 48), (14, 96, 96), (7, 192, 192), (28, 48, 1)):
        table[f"small conv3x3 {side}x{side}x{channels}->{outputs}"] = {
            name: QuantMatmul(side, side, channels, outputs, **FORMATS[name], **SAME) for name in ("w8", "w4", "w3")
        }
    for rows, channels, outputs in ((196, 96, 96), (49, 192, 192), (1, 48, 192)):
        table[f"small linear {rows}x{channels}x{outputs}"] = {
            name: QuantMatmul.linear((rows,), channels, outputs, **FORMATS[name]) for name in ("w8", "w4")
        }
    return table


# --- ours ---------------------------------------------------------------------------------------------------


@functools.cache
def compiled(problem: QuantMatmul, target: Isa) -> tuple[Call, Call]:
    """(the kernel, what prepares its weights)."""
    return _compiled(gemm, problem, target), _compiled(prepare, replace(problem, epilogue=None), target)


@functools.cache
def _compiled(module: Any, problem: QuantMatmul, target: Isa) -> Call:
    return tvm.compile(tvm.IRModule({"kernel": module.build(problem, target, "kernel")}), target=target.target())[
        "kernel"
    ]


def prepared(problem: QuantMatmul, target: Isa) -> dict[str, Any]:
    """The kernel's arguments by name, at batch 1, from random data."""
    buffers = make_case(problem, 1, 0).stored()
    for a in (*prepare.outputs(problem, target), gemm.arguments(problem, target)[-1]):
        buffers[a.name] = np.zeros(concrete(a.shape, 1), a.dtype)
    tensors = {name: tvm.runtime.tensor(np.ascontiguousarray(value)) for name, value in buffers.items()}
    made = [*stored_arguments(problem), *prepare.outputs(problem, target)]
    compiled(problem, target)[1](*[tensors[a.name] for a in made])
    return {a.name: tensors[a.name] for a in gemm.arguments(problem, target)}


def kernel(problem: QuantMatmul, target: Isa) -> tuple[Call, float]:
    """A call of the kernel on random data at batch 1, and its useful multiply-accumulates."""
    function, arguments = compiled(problem, target)[0], [*prepared(problem, target).values()]
    return lambda: function(*arguments), macs(problem)


def macs(problem: QuantMatmul) -> float:
    return problem.rows * problem.reduction * problem.outputs


# --- groups -------------------------------------------------------------------------------------------------


def products(target: Isa, only: str, wanted: Callable[[str], bool]) -> Iterator[Group]:
    """Linear layers and convolutions."""
    for name, by_format in (problems() | (to_codes() if target.engine else {})).items():
        chosen = {f"{name} {kind}": (kind, p) for kind, p in by_format.items() if only in f"{name} {kind}"}
        if not chosen:
            continue
        calls = {full: kernel(p, target) for full, (_, p) in chosen.items()}
        group = Group(name, {n: call for n, (call, _) in calls.items()}, {n: w for n, (_, w) in calls.items()}, "peak")
        first = next(iter(by_format.values()))
        if not name.startswith("small") and not name.endswith("codes") and len(by_format) > 1:
            linear = first.pointwise
            made = (
                operators.linear(first.rows, first.channels, first.outputs) if linear else operators.convolution(first)
            )
            group.peers = {n: call for n, call in made.items() if wanted(n)}
        if target.engine:
            by_tiles(group, chosen, target)
            yield group
            continue
        for full, (kind, p) in chosen.items():
            if (goal := goal_of(name, kind, p)) is not None:
                group.goals[full, "peak"] = goal
            if kind == "w4" and "linear" in name and p.rows >= 256 and f"{name} w8" in chosen:
                group.goals[full, f"{name} w8"] = 1 / AS_W8
        yield group


def to_codes() -> dict[str, dict[str, QuantMatmul]]:
    """Linear layers that write codes, which tiles are held against registers by: floats would measure their stores."""
    square = [(rows, size, size) for size in SIZES for rows in (64, 256, 1024, 4096)]
    return {
        f"linear {rows}x{outputs}x{channels} to codes": {
            name: QuantMatmul.linear((rows,), channels, outputs, epilogue=REQUANTIZED, **FORMATS[name])
            for name in ("w8", "w4", "w3", "w2")
        }
        for rows, outputs, channels in [*square, (1024, 5120, 1280), (1024, 1280, 5120)]
    }


def by_tiles(group: Group, chosen: Mapping[str, tuple[str, QuantMatmul]], target: Isa) -> None:
    """Adds what tiles are held against: each problem by registers, which has a row of its own."""
    for full, (kind, p) in chosen.items():
        if not WeightLayout(p, target).isa.depth:
            continue
        registers = f"{full} {REGISTERS}"
        group.ours[registers], group.work[registers] = kernel(p, ISAS[REGISTERS])
        if p.epilogue is None:
            continue
        group.goals[full, registers] = TILES_CONV if p.kernel == (3, 3) else TILES_LINEAR
        w8 = f"{full.removesuffix(kind)}w8"
        if kind in ("w4", "w3", "w2") and p.rows >= 256 and w8 in chosen:
            group.goals[full, w8] = TILES_AS_W8


def goal_of(name: str, kind: str, p: QuantMatmul) -> float | None:
    """The least share of the peak."""
    if name.startswith("conv3x3"):
        return CONV[p.height, p.channels]
    if not name.startswith("linear") or p.rows < 64 or kind not in GEMM or "," in name:
        return None
    if p.rows == 64 or p.outputs == 320:
        return 0.80 if kind == "base+b" else 0.85
    return GEMM[kind]


def groups_of_channels(target: Isa, only: str, wanted: Callable[[str], bool]) -> Iterator[Group]:
    """K-groups of 4 bits against MatMulNBits, both from floats."""
    for rows, size, block in itertools.product((1, 5, 64, 256, 1024), (640, 1280), (32, 64, 128)):
        name = f"linear {rows}x{size}x{size} w4 g{block}"
        if only not in name:
            continue
        p = QuantMatmul.linear((rows,), size, size, bits=4, segments=(block,) * (size // block), dynamic=True)
        arguments = prepared(p, target)
        from_floats = DynamicQuantize(rows, size, 8)
        made = {"x": np.random.default_rng(0).standard_normal((1, rows * size)).astype(np.float32)}
        tables = {"out": arguments["x"], "scale": arguments["act_scale"], "zero": arguments["act_zero"]}
        order = [tables.get(a.name) or tvm.runtime.tensor(made[a.name].reshape(concrete(a.shape, 1)))
                 for a in quantize_problems.arguments(from_floats)]  # fmt: skip
        ours, theirs = compiled(p, target)[0], _quantizer(from_floats, target)
        calls: dict[str, Call] = {
            name: functools.partial(ours, *arguments.values()),
            "quantize": functools.partial(theirs, *order),
        }
        group = Group(name, calls, {name: macs(p)}, "peak", also={name: "quantize"})
        if wanted("onnxruntime-nbits"):
            group.peers = operators.blocks_of_bits(rows, size, size, block)
            group.goals[name, "onnxruntime-nbits"] = NBITS
        if rows == 1:
            stored = sum(arguments[a.name].numpy().nbytes for a in prepare.outputs(p, target))
            group.peers = {**group.peers, READ: peak.reading(target, stored)[0]}
        yield group


@functools.cache
def _quantizer(problem: DynamicQuantize, target: Isa) -> Call:
    functions = {"quantize": quantize.build(problem, "quantize")}
    return tvm.compile(tvm.IRModule(functions), target=target.target())["quantize"]


def cold(target: Isa, only: str, wanted: Callable[[str], bool]) -> Iterator[Group]:
    """Matrix-vector products whose weights come from memory."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    bytes_ = 4 * max((1024 * int(path.read_text().strip().rstrip("K")) for path in sizes), default=1 << 25)
    for size, kind in itertools.product((640, 1280), ("w4", "w8", "w3", "w2")):
        name = f"cold linear 1x{size}x{size} {kind}"
        if only not in name:
            continue
        p = QuantMatmul.linear((1,), size, size, **FORMATS[kind])
        first = prepared(p, target)
        stored = first["tiles"].numpy().nbytes
        weights = [a.name for a in prepare.outputs(p, target)]
        copies = [
            [tvm.runtime.tensor(value.numpy()) if n in weights else value for n, value in first.items()]
            for _ in range(bytes_ // stored)
        ]
        read, total = peak.reading(target, len(copies) * stored)
        function = compiled(p, target)[0]

        def call(function: Call = function, copies: list[list[Any]] = copies) -> None:
            for arguments in copies:
                function(*arguments)

        group = Group(name, {name: call}, {name: len(copies) * stored, READ: total}, READ, {READ: read})
        if kind == "w4":
            group.goals[name, READ] = COLD
        yield group


# --- figures ------------------------------------------------------------------------------------------------


def quiet(group: Group, calls: Mapping[str, Call], rounds: int, best: dict[str, float]) -> dict[str, list[float]]:
    """Seconds of each call in so many rounds, where the paces before and behind it were `QUIET` of the best at least.

    The other thread of a core halves what tiles multiply, and registers hardly: whose neighbour is busy measures him.
    He comes and goes several times a second, so that whole rounds without him are rare.

    best: the highest rates of paces so far, which this changes: the peak is one for all groups, reading is not.
    """
    own = [name for name in calls if name != group.unit]
    paces = [f"{group.unit}, {n}" for n in range(len(own) + 1)]
    turns = {paces[0]: calls[group.unit]}
    for name, behind in zip(own, paces[1:], strict=True):
        turns |= {name: calls[name], behind: calls[group.unit]}
    which = group.unit if group.unit == "peak" else group.name
    # of each round the slower of both paces, and the call's seconds
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in own}
    for _ in range(TURNS):
        times = interleaved(turns, rounds, process=True)
        for name, before, behind in zip(own, paces, paces[1:], strict=False):
            found[name] += zip(map(max, times[before], times[behind]), times[name], strict=True)
        fastest = min(seconds for pace in paces for seconds in times[pace])
        best[which] = max(best.get(which, 0.0), group.work[group.unit] / fastest)
        slowest = group.work[group.unit] / best[which] / QUIET
        kept = {name: [each for each in of if each[0] <= slowest] for name, of in found.items()}
        count = min(map(len, kept.values()))
        if count >= rounds:
            break
    else:
        terminal.say(f"{group.name}: {count} of {len(found[own[0]])} rounds were quiet, fewer than {rounds}")
        kept, count = {name: sorted(of) for name, of in found.items()}, rounds
    chosen = {name: [seconds for _, seconds in of[:count]] for name, of in kept.items()}
    return {group.unit: [pace for pace, _ in kept[own[0]][:count]], **chosen}


def figures(group: Group, times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """For each of ours: microseconds, share of the unit, and times that others take, medians over the rounds."""
    found = {}
    for name in group.work:
        if name == group.unit:
            continue
        more = times.get(group.also.get(name, ""), [0.0] * len(times[name]))
        own = [a + b for a, b in zip(times[name], more, strict=True)]
        row = {"us": 1e6 * statistics.median(own)}
        rounds = zip(times[name], times[group.unit], strict=True)
        rate = [group.work[name] / a / (group.work[group.unit] / b) for a, b in rounds]
        row[group.unit] = statistics.median(rate)
        others = {*group.peers, *(what for of, what in group.goals if of == name)} - {group.unit}
        for other in sorted(others):
            row[other] = statistics.median(b / a for a, b in zip(own, times[other], strict=True))
        found[name] = row
    return found


def known_peak(path: Path, cpu: str) -> float:
    """Multiply-accumulates a second that earlier runs reached on a CPU of that name; 0 where none are told.

    A process whose neighbour is at work from beginning to end would take his pace for the best.
    """
    report = json.loads(path.read_text()) if path.is_file() else {}
    return 1e9 * max(report["peak_gmacs"]) if report.get("cpu") == cpu else 0.0


def measured(
    groups: Callable[[], Iterator[Group]], top: tuple[Call, int], rounds: int, peak_before: float = 0.0
) -> Iterator[tuple[Group, Any]]:
    """Each group and its `figures`."""
    best = {"peak": peak_before}
    for group in groups():
        calls = {**group.ours, **group.peers}
        if group.unit == "peak":
            calls, group.work = {"peak": top[0], **calls}, {**group.work, "peak": top[1]}
        yield group, figures(group, quiet(group, calls, rounds, best))


def row(name: str, group: Group, found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """A row of the report: over the runs, medians and [least, most]."""

    def over(what: str) -> dict[str, Any]:
        values = [each[what] for each in found]
        return {
            "median": round(statistics.median(values), 4),
            "spread": [round(v, 4) for v in (min(values), max(values))],
        }

    made: dict[str, Any] = {"name": name, "us": over("us"), group.unit: over(group.unit)}
    if READ in found[0]:
        made[READ] = over(READ)
    theirs = {peer: over(peer) for peer in group.peers if peer in found[0] and peer != READ}
    if theirs:
        made["best_peer"] = min(theirs, key=lambda peer: theirs[peer]["median"])
        made["times_as_long"] = theirs
    goals = {what: least for (of, what), least in group.goals.items() if of == name}
    if goals:
        made["goals"] = {what: {**over(what), "least": round(least, 4)} for what, least in goals.items()}
        made["met"] = all(goal["median"] >= goal["least"] for goal in made["goals"].values())
    return made


def write(report: dict[str, Any], path: Path, some: bool) -> None:
    """The report; of only some rows, into the one that is there."""
    if some and path.exists():
        again = {made["name"]: made for made in report["rows"]}
        report = json.loads(path.read_text())
        report["rows"] = [again.pop(made["name"], made) for made in report["rows"]] + list(again.values())
    path.write_text(json.dumps(report, indent=1) + "\n")


def cells(made: Mapping[str, Any]) -> list[str]:
    """The row as it is printed."""
    unit = "peak" if "peak" in made else READ
    goals = [f"{what} >= {goal['least']:.2f}: {goal['median']:.2f}" for what, goal in made.get("goals", {}).items()]
    verdict = {True: "yes", False: "NO", None: ""}[made.get("met")]
    best = made.get("best_peer")
    against = f"{made['times_as_long'][best]['median']:.2f} x {best}" if best else ""
    low, high = made[unit]["spread"]
    share = f"{100 * made[unit]['median']:.1f} % ({100 * low:.0f}-{100 * high:.0f})"
    return [made["name"], f"{made['us']['median']:.1f}", share, ", ".join(goals), verdict, against]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: shares of the peak by shape and format, and how many times as long the best peer takes as w8."""
    by_name = {made["name"]: made for made in rows}
    lines = ["| | " + " | ".join([*FORMATS, "best peer against w8"]) + " |", "|---" * (len(FORMATS) + 2) + "|"]
    for shape in problems():
        if f"{shape} base+b" not in by_name:
            continue
        made = [by_name[f"{shape} {kind}"] for kind in FORMATS]
        shares = [f"{100 * each['peak']['median']:.0f} %" + "*" * (each.get("met") is False) for each in made]
        best = made[0].get("best_peer")
        against = f"{made[0]['times_as_long'][best]['median']:.2f} x {best}" if best else ""
        lines.append("| " + " | ".join([shape, *shares, against]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in ISAS if name.startswith("x86")]
    parser.add_argument("--isa", help=f"{', '.join(names)}, or the end of one (default: the best that runs here)")
    parser.add_argument("--runs", type=int, default=3, help="each measures everything (default 3)")
    parser.add_argument("--rounds", type=int, default=10, help="of a run (default 10)")
    parser.add_argument("--only", default="", help="rows whose name contains this; the others of the JSON stay")
    parser.add_argument("--against", default=",".join(PEERS), help=f"peers, by commas (default {','.join(PEERS)})")
    parser.add_argument("--json", help="default benchmarks/results/kernels-ISA.json; '' for none")
    parser.add_argument("--docs", type=Path, help="only write the table of the JSON between the marks of this file")
    options = parser.parse_args()
    name = next((n for n in names if n == f"x86-64-{options.isa}"), options.isa or "native")
    try:
        target = isa(targets.resolve(name).name)
        if not options.docs:
            targets.require_runnable(targets.resolve(name))
    except UserError as error:
        raise SystemExit(str(error)) from error
    path = options.json if options.json is not None else RESULTS / f"kernels-{target.name}.json"
    if options.docs:
        documents.insert(options.docs, "kernels", table(json.loads(Path(path).read_text())["rows"]))
        return
    against = tuple(filter(None, options.against.split(",")))

    def wanted(peer: str) -> bool:
        return peer.startswith(against) if against else False

    def groups() -> Iterator[Group]:
        for family in (products, groups_of_channels, cold):
            yield from family(target, options.only, wanted)

    import torch

    torch.set_num_threads(1)
    top, before = peak.integer(target), known_peak(Path(path), provenance()["cpu"])
    found: dict[str, list[dict[str, float]]] = {}
    kept: dict[str, Group] = {}
    peaks = []
    for run in range(options.runs):
        count = len(kept) if run else 0
        with torch.inference_mode(), terminal.progress(f"run {run + 1} of {options.runs}", count) as advance:
            for group, by_name in measured(groups, top, options.rounds, before):
                for name, values in by_name.items():
                    found.setdefault(name, []).append(values)
                    kept[name] = replace(group, ours={}, peers=dict.fromkeys(group.peers, lambda: None))
                advance(len(by_name))
        peaks.append(top[1] / min(interleaved({"peak": top[0]}, options.rounds, process=True)["peak"]) / 1e9)
    rows = [row(name, kept[name], values) for name, values in found.items()]
    title = f"one thread, {target.name}: {statistics.median(peaks):.0f} GMAC/s at most"
    headers = ("kernel", "us", "of the peak (or of reading)", "goals", "met", "best peer")
    terminal.table(title, headers, [cells(made) for made in rows], numeric=(1, 2))
    missed = [made["name"] for made in rows if made.get("met") is False]
    judged = sum("met" in made for made in rows)
    terminal.say(f"{judged - len(missed)} of {judged} goals are met" + (f"; not {', '.join(missed)}" if missed else ""))
    if path:
        report: dict[str, Any] = {**provenance(), "isa": target.name, "threads": 1}
        report["versions"] |= {peer: version(peer) for peer in ("onnxruntime", "openvino") if wanted(peer)}
        report |= {"runs": options.runs, "rounds": options.rounds, "peak_gmacs": peaks, "rows": rows}
        write(report, Path(path), bool(options.only))


if __name__ == "__main__":
    main()
