"""The stand-alone quantize and time_group kernels, bit for bit against the definition, on every CPU target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_compiler.backends.tvm.kernels.cpu.quantize import build
from mpq_compiler.backends.tvm.kernels.problems.quantize import (
    DynamicQuantize,
    Problem,
    Quantize,
    TimeGroup,
    arguments,
    outputs,
)
from mpq_compiler.ir import ops
from tests.harness import qemu
from tests.harness.integer_kernels import AARCH64, X86, assert_same_bits, needs
from tests.harness.shapes import concrete, dynamic_quantize, quantize, seed

SHAPES = ((1,), (3,), (16,), (63,), (64,), (65,), (7, 7, 48), (5, 333))
PROBLEMS = [Quantize(shape, bits, groups) for shape in SHAPES for bits, groups in ((8, 1), (6, 3), (4, 2))]
PARTS = [
    Quantize((49, 48), 8, 3, parts=(32, 16)),
    Quantize((5, 333), 6, 2, parts=(200, 64, 69)),
    Quantize((1, 3), parts=(1, 2)),
]


def data(problem: Quantize, batch: int) -> dict[str, np.ndarray]:
    """Values within, at and far beyond the range, exact ties among them; zero points at both ends."""
    draw, top = np.random.default_rng(seed(problem, batch)), 2**problem.bits - 1
    scale = np.exp2(draw.integers(-12, 6, problem.groups)).astype(np.float32)
    scale[::2] *= np.float32(1.1)
    group = draw.integers(0, problem.groups, batch)
    steps = draw.integers(-2 * top, 2 * top, (batch, *problem.shape)) / 2  # halves: ties
    steps = steps + np.where(draw.random(steps.shape) < 0.5, 0, draw.standard_normal(steps.shape))
    x = (steps * scale[group].reshape(-1, *[1] * len(problem.shape))).astype(np.float32)
    special = np.array([np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e-45], np.float32)
    x.reshape(-1)[:: max(1, x.size // 7)] = np.resize(special, x.reshape(-1)[:: max(1, x.size // 7)].shape)
    zero = np.resize(np.array([0, top, top // 3]), problem.groups).astype(np.int32)
    tables = {"qscale": scale, "qzero": zero, "group": group}
    return {"x": x, **tables} if not problem.parts else {**_split(x, problem.parts), **tables}


def _split(x: np.ndarray, parts: Sequence[int]) -> dict[str, np.ndarray]:
    pieces = np.split(x, np.cumsum(parts)[:-1], axis=-1)
    return {f"x{i}": np.ascontiguousarray(piece) for i, piece in enumerate(pieces)}


def run(name: str, calls: Sequence[tuple[Problem, dict[str, np.ndarray]]]) -> list[np.ndarray]:
    """The outputs of the kernels of all calls, of a kernel with several one after the other."""
    isa = needs(name)
    names = {problem: f"k{i}" for i, problem in enumerate(dict.fromkeys(problem for problem, _ in calls))}
    module = tvm.IRModule({k: build(problem, k) for problem, k in names.items()})
    filled = []
    for problem, values in calls:
        order, batch = arguments(problem), len(next(iter(values.values())))
        made = [np.full(concrete(a.shape, batch), 77, a.dtype) for a in order[-outputs(problem) :]]
        filled.append((names[problem], [*(values[a.name] for a in order[: -len(made)]), *made]))
    counts = [outputs(problem) for problem, _ in calls]
    if name in AARCH64:
        remote = qemu.Aarch64Library(module, isa.target()).run(filled)
        return [t for tensors, count in zip(remote, counts, strict=True) for t in tensors[-count:]]
    library, results = tvm.compile(module, target=isa.target()), []
    for (kernel, values), count in zip(filled, counts, strict=True):
        tensors = [tvm.runtime.tensor(value) for value in values]
        library[kernel](*tensors)
        results += [t.numpy() for t in tensors[-count:]]
    return results


@pytest.mark.parametrize("name", [*X86, *AARCH64])
def test_quantize(name):
    calls = [(problem, data(problem, batch)) for problem in [*PROBLEMS, *PARTS] for batch in (1, 4)]
    for (problem, d), got in zip(calls, run(name, calls), strict=True):
        x = np.concatenate([value for key, value in d.items() if key.startswith("x")], axis=-1)
        wanted = quantize(x, d["qscale"], d["qzero"], d["group"], problem.bits)
        assert_same_bits(got, wanted, problem)


@pytest.mark.parametrize("name", [*X86, *AARCH64])
def test_dynamic_quantize(name):
    """Rows of every kind: one sign, zeros, the smallest scale and below, wide ranges, ties at half a step."""
    calls, wanted = [], []
    for rows, width, bits in ((1, 1, 8), (3, 5, 8), (2, 63, 4), (5, 64, 8), (4, 65, 6), (7, 200, 8), (2, 1153, 2)):
        draw = np.random.default_rng(seed("dynamic", rows, width, bits))
        x = draw.standard_normal((4, rows, width)) * np.exp2(draw.integers(-30, 30, (4, rows, 1)))
        x[1], x[2, 0], x[2, -1] = np.abs(x[1]), 0, -np.abs(x[2, -1])
        x[3] = np.round(2 * x[3]) / 2
        x[3, :, 0], x[3, :, -1] = -(2.0**bits - 1) / 2, (2.0**bits - 1) / 2
        x = x.astype(np.float32)
        calls.append((DynamicQuantize(rows, width, bits), {"x": x}))
        wanted += dynamic_quantize(x, bits)
    for got, want in zip(run(name, calls), wanted, strict=True):
        assert_same_bits(got, want)


def test_dynamic_quantize_is_that_of_the_dialect():
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(0))
    for bits in (2, 8):
        for got, want in zip(ops.dynamic_quantize(x, bits), dynamic_quantize(x.numpy(), bits), strict=True):
            assert_same_bits(got.reshape(want.shape).numpy(), want)


@pytest.mark.parametrize("name", ["x86-64-avx512vnni", *AARCH64])
def test_nan_has_one_code_everywhere(name):
    problem = Quantize((67,))
    d = data(problem, 2)
    d["x"][:] = np.nan
    (got,) = run(name, [(problem, d)])
    assert (got == d["qzero"][0]).all()


@pytest.mark.parametrize("name", ["x86-64-avx2", *AARCH64])
def test_time_group(name):
    draw = np.random.default_rng(0)
    calls, wanted = [], []
    for groups in (2, 3, 9):
        for dtype in ("int64", "float32"):
            boundaries = np.sort(draw.integers(0, 1000, groups - 1)).astype(np.float32)
            timestep = np.concatenate([[-1, 0, 999, 5000], boundaries, boundaries - 1]).astype(dtype)
            calls.append((TimeGroup(groups, dtype), {"timestep": timestep, "boundaries": boundaries}))
            wanted.append((timestep[:, None].astype(np.float32) >= boundaries).sum(1))
    for got, want in zip(run(name, calls), wanted, strict=True):
        assert_same_bits(got, want)


_COMPILED: dict[int, tvm.runtime.Module] = {}


@settings(max_examples=200)
@given(
    x=st.lists(st.floats(allow_nan=False, width=32), min_size=5, max_size=5),
    scale=st.floats(2**-20, 2**20, width=32),
    zero=st.integers(0, 255),
)
def test_quantize_of_any_numbers(x, scale, zero):
    if not _COMPILED:
        target = needs("x86-64-avx2").target()
        _COMPILED[0] = tvm.compile(tvm.IRModule({"k": build(Quantize((5,)), "k")}), target=target)
    values = {
        "x": np.array([x], np.float32),
        "qscale": np.array([scale], np.float32),
        "qzero": np.array([zero], np.int32),
        "group": np.zeros(1, np.int64),
    }
    out = tvm.runtime.tensor(np.zeros((1, 5), np.uint8))
    _COMPILED[0]["k"](*[tvm.runtime.tensor(value) for value in values.values()], out)
    wanted = quantize(values["x"], values["qscale"], values["qzero"], values["group"], 8)
    assert_same_bits(out.numpy(), wanted)
