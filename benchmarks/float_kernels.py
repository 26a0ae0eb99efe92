"""Speed of the float kernels against torch eager, one thread.

    python benchmarks/float_kernels.py [--target NAME] [--rounds N] [--only TEXT] [--json FILE]

The kernel and torch doing the same run interleaved, in rounds; each figure is the least CPU time of the thread
over the rounds. Torch gets its better layout (channels first or last) and runs a region operation by operation,
as the model does; where the region ends in a quantizer, torch quantizes too (multiply, round, clamp, to uint8).
`ratio` is torch's time over the kernel's. Output checks belong to the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TVM_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import tvm

from benchmarks.machine import provenance
from benchmarks.timing import interleaved
from mpq_compiler import targets
from mpq_compiler.backends.tvm.kernels import attention, float_gemm, matmul, movement, norms, pointwise
from mpq_compiler.backends.tvm.kernels.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.matmul import Access, Matmul
from mpq_compiler.backends.tvm.kernels.pointwise import Input, PointwiseProgram, PointwiseStep, Result
from tests.float_kernels import shape_of, tvm_target

QUANTIZE = Step("quantize", value=8)
SILU, SILU_Q = Epilogue((Step("silu"),)), Epilogue((Step("silu"), QUANTIZE))
MODULATE = (Step("mul", operand=0), Step("add", operand=1))
SAMPLE2 = (Operand("sample"), Operand("sample"))
# (side, channels): latent-diffusion U-Nets, then the bundled denoiser
IMAGES = ((64, 320), (32, 640), (16, 1280), (32, 128), (16, 256), (28, 48), (14, 48), (14, 96), (7, 96), (7, 192))


@dataclass(frozen=True)
class Contest:
    """A kernel, and torch doing the same in one way or more."""

    name: str
    module: Any
    problem: Any
    rivals: Callable[[list[torch.Tensor]], list[Callable[[], object]]]
    batch: int = 1


def _quantize(x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(torch.round(x * 30.0) + 128.0, 0, 255).to(torch.uint8)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _group_norms() -> Iterator[Contest]:
    for side, channels in IMAGES:
        for ending, epilogue, last in (("", SILU, _identity), (" q", SILU_Q, _quantize)):
            problem = norms.GroupNorm(side * side, channels, 16 if channels == 48 else 32, epilogue=epilogue)

            def rivals(t, p=problem, side=side, last=last):
                first = t[0].reshape(1, side, side, p.channels).permute(0, 3, 1, 2)
                forms = (first, first.contiguous())
                return [lambda x=x: last(F.silu(F.group_norm(x, p.groups, t[1], t[2], p.eps))) for x in forms]

            yield Contest(f"group_norm silu{ending} {side}x{side}x{channels}", norms, problem, rivals)


def _layer_norms() -> Iterator[Contest]:
    for rows, channels in ((4096, 320), (1024, 640), (256, 1280), (256, 512), (49, 192)):
        for ending, steps, last in (("", MODULATE, _identity), (" q", (*MODULATE, QUANTIZE), _quantize)):
            problem = norms.LayerNorm(rows, channels, scale=False, shift=False, epilogue=Epilogue(steps, SAMPLE2))

            def rivals(t, p=problem, last=last):
                return [
                    lambda: last(F.layer_norm(t[0], (p.channels,), None, None, p.eps) * t[1][:, None] + t[2][:, None])
                ]

            yield Contest(f"layer_norm modulate{ending} {rows}x{channels}", norms, problem, rivals)


def _attention() -> Iterator[Contest]:
    for queries, keys, heads, dim in (
        (49, 49, 8, 24), (196, 196, 4, 24), (256, 256, 8, 64), (1024, 1024, 8, 40), (1024, 77, 8, 80), (64, 77, 8, 64)
    ):  # fmt: skip
        problem = attention.Attention(queries, keys, heads, dim)

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

        yield Contest(f"upsample {side}x{side}x{channels}", movement, movement.upsample(shape, (2, 2)), upsample)
        both = movement.concat([shape, shape], -1)
        yield Contest(f"concat {side}x{side}x{channels}", movement, both, lambda t: [lambda: torch.cat(t[:2], -1)])


def _float_gemm() -> Iterator[Contest]:
    shapes = ((1, 48, 192), (1, 192, 192), (1, 320, 1280), (49, 192, 192), (256, 640, 640))
    for batch, (rows, inputs, outputs) in ((b, shape) for shape in shapes for b in (1, 8) if b == 1 or shape[0] == 1):
        problem = float_gemm.Linear(rows, inputs, outputs)

        def linear(t):
            return [lambda: F.linear(*t[:3])]

        yield Contest(f"linear {batch * rows}x{inputs}x{outputs}", float_gemm, problem, linear, batch)
    for side, inputs, outputs in ((28, 1, 48), (28, 48, 1), (14, 96, 96), (32, 4, 320), (32, 320, 4)):
        problem = float_gemm.Conv2d(side, side, inputs, outputs)

        def conv(t):
            x, w = t[0].permute(0, 3, 1, 2), t[1].permute(0, 3, 1, 2)
            pairs = ((x, w), (x.contiguous(), w.contiguous()))
            return [lambda x=x, w=w: F.conv2d(x, w, t[2], 1, 1) for x, w in pairs]

        yield Contest(f"conv3x3 {side}x{side}x{inputs}->{outputs}", float_gemm, problem, conv)


def _transformers() -> Iterator[Contest]:
    """What SD3, Flux and Sana add: norms of heads, rotary embeddings, linear attention, depthwise convolutions."""
    for rows, channels in ((1024 * 24, 64), (1024 * 24, 128), (1024, 1152), (256, 2240)):
        problem = norms.RmsNorm(rows, channels)

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
        problem = float_gemm.Conv2d(side, side, channels, channels, groups=channels)

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
        fixed = {"qscale": 1 / 30, "qzero": 128, "group": 0}.get(argument.name)
        value = rng.standard_normal(shape) if fixed is None else np.full(shape, fixed)
        arrays.append(value.astype(argument.dtype))
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="native")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="contests whose name contains this text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = targets.resolve(options.target)
    targets.require_runnable(target)
    results = []
    print(f"{'':44}{'us':>10}{'torch':>10}{'ratio':>8}   {target.name}")
    with torch.inference_mode():
        for contest in contests():
            if options.only not in contest.name:
                continue
            kernel = contest.module.build(contest.problem, target.isa, "kernel")
            function = tvm.compile(tvm.IRModule({"kernel": kernel}), target=tvm_target(target.name))["kernel"]
            arrays = _arguments(contest)
            tensors = [tvm.runtime.tensor(a) for a in arrays]
            rivals = contest.rivals([torch.from_numpy(a) for a in arrays])
            calls = {"ours": lambda f=function, t=tensors: f(*t)}
            calls |= {f"torch {i}": rival for i, rival in enumerate(rivals)}
            times = {n: 1e6 * min(found) for n, found in interleaved(calls, options.rounds, 2e-4).items()}
            ours = times.pop("ours")
            theirs = min(times.values())
            print(f"{contest.name:44}{ours:10.1f}{theirs:10.1f}{theirs / ours:8.2f}", flush=True)
            results.append({"name": contest.name, "us": ours, "torch_us": theirs, "ratio": theirs / ours})
    if options.json:
        record = {**provenance(), "target": target.name, "threads": 1, "rounds": options.rounds, "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
