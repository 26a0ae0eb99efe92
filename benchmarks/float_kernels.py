"""Float kernels: share of the CPU's peak, and against torch, onnxruntime and OpenVINO; norms, movement, GEMM, conv.

    python -m benchmarks.float_kernels                      # all, into benchmarks/results/float_kernels.json
    python -m benchmarks.float_kernels --only 'norm' --runs 1 --json ''

One thread. A kernel, its peers and what it is a share of take turns, in rounds, each with a call that is not timed
before; figures are medians over the rounds of the process's CPU time, and medians of those over the runs, with their
least and most beside. Products are a share of what one core can multiply and add on registers only, in float32 or
bfloat16; what moves memory, of a copy (`numpy.copyto`) of as many bytes as it writes, 1 being as fast. Torch runs a
region operation by operation, as the model does, with channels first and last; peers of GEMM and convolutions have
weights and layouts of their own, those of norms what is exported to ONNX. Where a region ends in a quantizer, all
quantize. Each row says how long its kernel took to compile. Outputs are checked by the tests.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import tvm

from benchmarks import graphs, operators
from benchmarks.kernels import Group, figures, row, write
from benchmarks.machine import provenance
from benchmarks.timing import interleaved
from mpq_compiler.backends.tvm.compile import peak
from mpq_compiler.backends.tvm.kernels.cpu import attention, float_gemm, matmul, movement, norms, pointwise
from mpq_compiler.backends.tvm.kernels.cpu.isa import isa
from mpq_compiler.backends.tvm.kernels.problems import movement as problems
from mpq_compiler.backends.tvm.kernels.problems.attention import Attention
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import FEW_OUTPUTS, FEW_ROWS, Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.problems.matmul import Access, Matmul
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm, RmsNorm
from mpq_compiler.backends.tvm.kernels.problems.pointwise import Input, PointwiseProgram, PointwiseStep, Result
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from mpq_compiler.support import terminal
from mpq_compiler.support.tensorfile import aligned
from mpq_compiler.targets import table as targets
from mpq_compiler.targets.numerics import BF16, F32, features_of
from tests.harness.float_kernels import shape_of

QUANTIZE = Step("quantize", value=8)
SILU, SILU_Q = Epilogue((Step("silu"),)), Epilogue((Step("silu"), QUANTIZE))
MODULATE = (Step("mul", operand=0), Step("add", operand=1))
SAMPLE2 = (Operand("sample"), Operand("sample"))
# (side, channels): latent-diffusion U-Nets, then the bundled denoiser
IMAGES = ((64, 320), (32, 640), (16, 1280), (32, 128), (16, 256), (28, 48), (14, 48), (14, 96), (7, 96), (7, 192))


RESULTS = Path(__file__).parent / "results" / "float_kernels.json"
PEAK, COPY = "peak", "copy"
GROUP_NORM, LAYER_NORM, PRODUCT, CONCAT = 2.5, 4.0, 0.88, 1.0
"""The least: times that torch takes as long (norms that quantize); shares of the peak; speed of a copy."""


@dataclass(frozen=True)
class Contest:
    """A kernel, torch doing the same in one way or more, other peers, and the least that is asked for.

    torch:   of the kernel's arguments
    peers:   by name, made when they are needed
    goals:   of what -> the least: ``peak``, ``copy``, ``torch`` (each of its ways), ``peers`` (each)
    macs:    of a call, where products count
    """

    name: str
    module: Any
    problem: Any
    torch: Callable[[list[torch.Tensor]], list[Callable[[], object]]] = lambda t: []
    batch: int = 1
    peers: Callable[[], dict[str, Callable[[], object]]] = dict
    goals: dict[str, float] = field(default_factory=dict)
    macs: int = 0


def _quantize(x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(torch.round(x * 30.0) + 128.0, 0, 255).to(torch.uint8)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _group_norms() -> Iterator[Contest]:
    for side, channels in IMAGES:
        for ending, epilogue, last in (("", SILU, _identity), (" q", SILU_Q, _quantize)):
            problem = GroupNorm(side * side, channels, 16 if channels == 48 else 32, epilogue=epilogue)

            def rivals(t, p=problem, side=side, last=last):
                first = t[0].reshape(1, side, side, p.channels).permute(0, 3, 1, 2)
                forms = (first, first.contiguous())
                return [lambda x=x: last(F.silu(F.group_norm(x, p.groups, t[1], t[2], p.eps))) for x in forms]

            others = functools.partial(graphs.group_norm, side, channels, problem.groups, problem.eps, bool(ending))
            goals = {"torch": GROUP_NORM, "peers": 1.0} if ending else {}
            name = f"group_norm silu{ending} {side}x{side}x{channels}"
            yield Contest(name, norms, problem, rivals, peers=others, goals=goals)


def _layer_norms() -> Iterator[Contest]:
    for rows, channels in ((4096, 320), (1024, 640), (256, 1280), (256, 512), (49, 192)):
        for ending, steps, last in (("", MODULATE, _identity), (" q", (*MODULATE, QUANTIZE), _quantize)):
            problem = LayerNorm(rows, channels, scale=False, shift=False, epilogue=Epilogue(steps, SAMPLE2))

            def rivals(t, p=problem, last=last):
                return [
                    lambda: last(F.layer_norm(t[0], (p.channels,), None, None, p.eps) * t[1][:, None] + t[2][:, None])
                ]

            others = functools.partial(graphs.layer_norm, rows, channels, problem.eps, bool(ending))
            goals = {"torch": LAYER_NORM, "peers": 1.0} if ending else {}
            name = f"layer_norm modulate{ending} {rows}x{channels}"
            yield Contest(name, norms, problem, rivals, peers=others, goals=goals)


def _attention() -> Iterator[Contest]:
    for queries, keys, heads, dim in (
        (49, 49, 8, 24), (196, 196, 4, 24), (256, 256, 8, 64), (1024, 1024, 8, 40), (1024, 77, 8, 80), (64, 77, 8, 64)
    ):  # fmt: skip
        problem = Attention(queries, keys, heads, dim)

        def rivals(t, p=problem):
            q, k, v = (x.reshape(1, -1, p.heads, p.dim).transpose(1, 2) for x in t[:3])
            return [lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()]

        yield Contest(f"attention {queries}x{keys} {heads} heads of {dim}", attention, problem, rivals)


def _pointwise() -> Iterator[Contest]:
    functions = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    for name, function in functions.items():
        for rows, channels in ((4096, 320), (1024, 1280), (1024, 128), (196, 96), (1, 192)):
            shape = ("B", rows, channels)
            program = PointwiseProgram(((shape, "float32"),), (PointwiseStep(name, (Input(0),)),), shape)
            yield Contest(f"{name} {rows}x{channels}", pointwise, program, lambda t, f=function: [lambda: f(t[0])])
    for rows, channels in ((4096, 320), (256, 256), (196, 96), (49, 192)):
        shape, vector = ("B", rows, channels), ("B", 1, channels)
        add = PointwiseStep("add", (Input(0), Input(1)))
        program = PointwiseProgram(((shape, "float32"), (shape, "float32")), (add,), shape)
        yield Contest(f"add {rows}x{channels}", pointwise, program, lambda t: [lambda: t[0] + t[1]])
        quantized = replace(program, steps=(add, PointwiseStep("quantize", (Result(0),), 8)))
        yield Contest(f"add q {rows}x{channels}", pointwise, quantized, lambda t: [lambda: _quantize(t[0] + t[1])])
        program = PointwiseProgram(((shape, "float32"), (vector, "float32")), (add,), shape)
        yield Contest(f"add per sample {rows}x{channels}", pointwise, program, lambda t: [lambda: t[0] + t[1]])


def _movement() -> Iterator[Contest]:
    for side, channels in ((16, 640), (8, 512), (14, 96), (7, 192)):
        shape = ("B", side, side, channels)

        def upsample(t):
            forms = (t[0].permute(0, 3, 1, 2), t[0].permute(0, 3, 1, 2).contiguous())
            return [lambda x=x: F.interpolate(x, scale_factor=2.0, mode="nearest") for x in forms]

        yield Contest(f"upsample {side}x{side}x{channels}", movement, problems.upsample(shape, (2, 2)), upsample)
    for side, channels in ((64, 320), (32, 640), (16, 1280), (32, 128), (16, 256), (8, 512), (14, 96), (7, 192)):
        shape = ("B", side, side, channels)
        both, half = problems.concat([shape, shape], -1), np.ones((1, side, side, channels), np.float32)
        nodes = [("Concat", ("a", "b"), "y", {"axis": -1})]
        yield Contest(
            f"concat {side}x{side}x{channels}", movement, both,
            lambda t: [lambda out=t[2]: torch.cat(t[:2], -1, out=out)],
            peers=functools.partial(graphs.run, nodes, {"a": half, "b": half + 1}, {}), goals={COPY: CONCAT},
        )  # fmt: skip
    for shape, order in (
        (("B", 64, 64, 4), (0, 3, 1, 2)), (("B", 4, 64, 64), (0, 2, 3, 1)), (("B", 64, 64, 320), (0, 3, 1, 2)),
        (("B", 1024, 24, 64), (0, 2, 1, 3)),
    ):  # fmt: skip
        turned = problems.permute(shape, order)
        name = f"permute {'x'.join(map(str, shape[1:]))} to {','.join(map(str, order[1:]))}"
        yield Contest(name, movement, turned, lambda t, order=order: [lambda: t[0].permute(order).contiguous()])


LINEAR = (
    *((1, 320, 1280), (49, 192, 192), (64, 320, 320), (64, 640, 640), (256, 640, 640), (256, 1280, 1280)),
    *((1024, 320, 1280), (1024, 640, 640), (4096, 320, 320)),
)
CONV = ((64, 320, 320), (32, 640, 640), (16, 1280, 1280), (32, 128, 128), (16, 256, 256), (64, 4, 320), (64, 320, 4))
"""Side, inputs, outputs: the last two are conv_in and conv_out, whose few terms or outputs leave lanes empty."""


def _float_gemm() -> Iterator[Contest]:
    """As artifacts run them: weights packed at load, where the kernel reads them in panels."""
    for kind in (F32, BF16):
        of_kind = "fp32" if kind == F32 else "bf16"

        def chosen(made: dict[str, Callable[[], object]], of_kind: str = of_kind) -> dict[str, Callable[[], object]]:
            return {name: call for name, call in made.items() if name.endswith(of_kind)}

        for rows, inputs, outputs in LINEAR:
            few = rows < FEW_ROWS and kind == F32
            problem = Linear(rows, inputs, outputs, packed=not few, numerics=kind)
            yield Contest(
                f"linear {kind} {rows}x{inputs}x{outputs}", float_gemm, problem,
                peers=lambda size=(rows, inputs, outputs), chosen=chosen: chosen(operators.linear(*size)),
                goals={PEAK: PRODUCT} if rows >= 64 else {}, macs=rows * inputs * outputs,
            )  # fmt: skip
        for side, inputs, outputs in CONV:
            few = outputs <= FEW_OUTPUTS and kind == F32
            problem = Conv2d(side, side, inputs, outputs, packed=not few, numerics=kind)
            same = QuantMatmul(side, side, inputs, outputs, kernel=(3, 3), padding=(1, 1, 1, 1), bits=8)
            yield Contest(
                f"conv3x3 {kind} {side}x{side}x{inputs}->{outputs}", float_gemm, problem,
                peers=lambda same=same, chosen=chosen: chosen(operators.convolution(same)),
                goals={PEAK: PRODUCT} if min(inputs, outputs) > 4 else {}, macs=side * side * inputs * outputs * 9,
            )  # fmt: skip


def _transformers() -> Iterator[Contest]:
    """What SD3, Flux and Sana add: norms of heads, rotary embeddings, linear attention, depthwise convolutions."""
    for rows, channels in ((1024 * 24, 64), (1024 * 24, 128), (1024, 1152), (256, 2240)):
        problem = RmsNorm(rows, channels)

        def rms(t, p=problem):
            return [lambda: F.rms_norm(t[0], (p.channels,), t[1], p.eps)]

        yield Contest(f"rms_norm {rows}x{channels}", norms, problem, rms)
    for tokens, heads, dim in ((1024, 24, 128), (256, 16, 72)):
        shape, table = ("B", tokens, heads, dim), (1, tokens, 1, dim)
        x, cos, sin = (Input(i) for i in range(3))
        turn, first = PointwiseStep("rotate", (x,)), PointwiseStep("mul", (x, cos))
        steps = (turn, first, PointwiseStep("mul", (Result(0), sin)), PointwiseStep("add", (Result(1), Result(2))))
        inputs = ((shape, "float32"), (table, "float32"), (table, "float32"))

        def rope(t):
            def rotated():
                a, b = t[0].unflatten(-1, (-1, 2)).unbind(-1)
                return t[0] * t[1] + torch.stack([-b, a], -1).flatten(-2) * t[2]

            return [rotated]

        yield Contest(f"rope {tokens}x{heads}x{dim}", pointwise, PointwiseProgram(inputs, steps, shape), rope)
    for tokens, heads, dim in ((1024, 70, 32), (256, 20, 32)):
        wide, across = heads * dim, heads * (dim + 1)
        values, keys = (
            Access((tokens, heads, dim + 1), (dim + 1, 1, across)),
            Access((tokens, heads, dim), (dim, wide, 1)),
        )
        state = Access((heads, dim + 1, dim), ((dim + 1) * dim, dim, 1))
        problem = Matmul((heads,), dim + 1, tokens, dim, values, keys, state)

        def summed(t):
            return [lambda: torch.einsum("bkhm,bkhn->bhmn", t[0], t[1])]

        yield Contest(f"sum of keys and values {tokens}x{heads}x{dim}", matmul, problem, summed)
        queries = Access((tokens, heads, dim), (dim, wide, 1))
        transposed = Access((heads, dim + 1, dim), ((dim + 1) * dim, 1, dim))
        problem = Matmul(
            (heads,), tokens, dim, dim + 1, queries, transposed, Access((tokens, heads, dim + 1), (dim + 1, across, 1))
        )

        def read(t):
            return [lambda: torch.einsum("bhmk,bnhk->bnhm", t[1], t[0])]

        yield Contest(f"queries {tokens}x{heads}x{dim}", matmul, problem, read)
    for side, channels in ((16, 1120), (32, 2240)):
        problem = Conv2d(side, side, channels, channels, groups=channels)

        def depthwise(t, channels=channels):
            x, w = t[0].permute(0, 3, 1, 2), t[1].permute(0, 3, 1, 2)
            pairs = ((x, w), (x.contiguous(), w.contiguous()))
            return [lambda x=x, w=w: F.conv2d(x, w, t[2], 1, 1, 1, channels) for x, w in pairs]

        yield Contest(f"depthwise 3x3 {side}x{side}x{channels}", float_gemm, problem, depthwise)


def contests() -> Iterator[Contest]:
    for family in (_group_norms, _layer_norms, _attention, _pointwise, _movement, _float_gemm, _transformers):
        yield from family()


def _arguments(contest: Contest) -> list[np.ndarray]:
    rng, arrays = np.random.default_rng(0), []
    for argument in contest.module.arguments(contest.problem):
        shape = shape_of(argument, contest.batch)
        if argument.name == "weight" and contest.problem.packed:
            plain = contest.module.pack_arguments(contest.problem)[0]
            weight = rng.standard_normal(shape_of(plain, 1)).astype(np.float32)
            arrays.append(aligned(contest.module.pack_weight(contest.problem, weight)))
            continue
        fixed = {"qscale": 1 / 30, "qzero": 128, "group": 0}.get(argument.name)
        value = rng.standard_normal(shape) if fixed is None else np.full(shape, fixed)
        arrays.append(aligned(value.astype(argument.dtype)))
    return arrays


@functools.cache
def _compiled(module: Any, problem: Any, target: targets.Target) -> tuple[Callable[..., object], float]:
    """The kernel, and the seconds that TVM took for it."""
    start = time.thread_time()
    kernel = module.build(problem, target.isa, "kernel")
    row_of = targets.with_features(target, features_of(getattr(problem, "numerics", F32), target.arch))
    library = tvm.compile(tvm.IRModule({"kernel": kernel}), target=tvm.target.Target(dict(row_of.tvm)))
    return library["kernel"], time.thread_time() - start


def group_of(contest: Contest, target: targets.Target, peaks: dict[str, peak.Loop]) -> tuple[Group, float]:
    """What takes turns, and the seconds that the kernel took to compile."""
    function, seconds = _compiled(contest.module, contest.problem, target)
    arrays = _arguments(contest)
    call = functools.partial(function, *map(tvm.runtime.from_dlpack, arrays))
    ways = contest.torch([torch.from_numpy(a) for a in arrays])
    peers = {f"torch-{i}" if len(ways) > 1 else "torch": way for i, way in enumerate(ways)}
    if contest.macs:
        loop, most = peaks[contest.problem.numerics]
        unit, work = PEAK, {contest.name: float(contest.macs), PEAK: float(most)}
    else:
        copied, source = (aligned(np.ones(arrays[-1].nbytes, np.uint8)) for _ in range(2))
        loop, unit, work = functools.partial(np.copyto, copied, source), COPY, {contest.name: 1.0, COPY: 1.0}
    group = Group(contest.name, {unit: loop, contest.name: call}, work, unit, peers | contest.peers())
    for what, least in contest.goals.items():
        for name in (n for n in group.peers if n.startswith("torch") == (what == "torch")):
            if what in ("torch", "peers"):
                group.goals[contest.name, name] = least
        if what == unit:
            group.goals[contest.name, unit] = least
    return group, seconds


def cells(made: dict[str, Any]) -> list[str]:
    """A row as it is printed: of several goals the one that is met least."""
    unit = PEAK if PEAK in made else COPY
    goals = made.get("goals", {})
    worst = min(goals, key=lambda what: goals[what]["median"] / goals[what]["least"], default=None)
    goal = f"{worst} >= {goals[worst]['least']:.2f}: {goals[worst]['median']:.2f}" if worst else ""
    best, (low, high) = made.get("best_peer"), made[unit]["spread"]
    against = f"{made['times_as_long'][best]['median']:.2f} x {best}" if best else ""
    share = f"{100 * made[unit]['median']:.0f} % ({100 * low:.0f}-{100 * high:.0f}) of {unit}"
    verdict = {True: "yes", False: "NO", None: ""}[made.get("met")]
    return [made["name"], f"{made['us']['median']:.1f}", share, goal, verdict, against, f"{made['compile_ms']:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="native")
    parser.add_argument("--runs", type=int, default=3, help="each measures everything (default 3)")
    parser.add_argument("--rounds", type=int, default=10, help="of a run (default 10)")
    parser.add_argument("--only", default="", help="contests whose name contains this; the others of the JSON stay")
    parser.add_argument("--json", default=str(RESULTS), help="'' for none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = targets.resolve(options.target)
    targets.require_runnable(target)
    peaks = {F32: peak.floating(isa(target.name))}
    if BF16 in targets.numerics_of(options.target):
        peaks[BF16] = peak.bfloat16(isa(target.name))
    chosen = [c for c in contests() if options.only in c.name and getattr(c.problem, "numerics", F32) in peaks]
    found: dict[str, list[dict[str, float]]] = {}
    kept: dict[str, tuple[Group, float]] = {}
    for run in range(options.runs):
        with torch.inference_mode(), terminal.progress(f"run {run + 1} of {options.runs}", len(chosen)) as advance:
            for contest in chosen:
                group, seconds = group_of(contest, target, peaks)
                times = interleaved({**group.ours, **group.peers}, options.rounds, process=True, warm=True)
                found.setdefault(contest.name, []).append(figures(group, times)[contest.name])
                kept[contest.name] = replace(group, ours={}, peers=dict.fromkeys(group.peers, lambda: None)), seconds
                advance(1)
    rows = [
        {**row(name, kept[name][0], values), "compile_ms": round(1e3 * kept[name][1], 1)}
        for name, values in found.items()
    ]
    headers = ("kernel", "us", "share", "goal", "met", "best peer", "compiled in ms")
    terminal.table(f"one thread, {target.name}", headers, [cells(made) for made in rows], numeric=(1, 2, 6))
    missed = [made["name"] for made in rows if made.get("met") is False]
    judged = sum("met" in made for made in rows)
    terminal.say(f"{judged - len(missed)} of {judged} goals are met" + (f"; not {', '.join(missed)}" if missed else ""))
    if options.json:
        report: dict[str, Any] = {**provenance(), "target": target.name, "threads": 1}
        report["versions"] |= {peer: version(peer) for peer in ("onnxruntime", "openvino")}
        gmacs = {
            kind: round(most / statistics.median(interleaved({"": loop}, options.rounds)[""]) / 1e9, 1)
            for kind, (loop, most) in peaks.items()
        }
        report |= {"runs": options.runs, "rounds": options.rounds, "peak_gmacs": gmacs, "rows": rows}
        write(report, Path(options.json), bool(options.only))


if __name__ == "__main__":
    main()
