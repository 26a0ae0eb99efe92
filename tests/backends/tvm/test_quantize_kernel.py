"""The stand-alone quantize and time_group kernels, bit for bit against the definition, on every CPU target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_compiler.backends.tvm.kernels.quantize import Quantize, TimeGroup, arguments, build
from tests import qemu
from tests.integer_kernels import AARCH64, X86, assert_same_bits, needs
from tests.shapes import concrete, quantize, seed

SHAPES = ((1,), (3,), (16,), (63,), (64,), (65,), (7, 7, 48), (5, 333))
PROBLEMS = [Quantize(shape, bits, groups) for shape in SHAPES for bits, groups in ((8, 1), (6, 3), (4, 2))]


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
    return {"x": x, "qscale": scale, "qzero": zero, "group": group}


def run(name: str, calls: Sequence[tuple[Quantize | TimeGroup, dict[str, np.ndarray]]]) -> list[np.ndarray]:
    """The outputs of the kernels of all calls."""
    isa = needs(name)
    names = {problem: f"k{i}" for i, problem in enumerate(dict.fromkeys(problem for problem, _ in calls))}
    module = tvm.IRModule({k: build(problem, k) for problem, k in names.items()})
    filled = []
    for problem, values in calls:
        order, batch = arguments(problem), len(next(iter(values.values())))
        out = np.full(concrete(order[-1].shape, batch), 77, order[-1].dtype)
        filled.append((names[problem], [values[a.name] for a in order[:-1]] + [out]))
    if name == AARCH64:
        return [tensors[-1] for tensors in qemu.Aarch64Library(module, isa.target()).run(filled)]
    library, results = tvm.compile(module, target=isa.target()), []
    for kernel, values in filled:
        tensors = [tvm.runtime.tensor(value) for value in values]
        library[kernel](*tensors)
        results.append(tensors[-1].numpy())
    return results


@pytest.mark.parametrize("name", [*X86, AARCH64])
def test_quantize(name):
    calls = [(problem, data(problem, batch)) for problem in PROBLEMS for batch in (1, 4)]
    for (problem, d), got in zip(calls, run(name, calls), strict=True):
        wanted = quantize(d["x"], d["qscale"], d["qzero"], d["group"], problem.bits)
        assert_same_bits(got, wanted, problem)


@pytest.mark.parametrize("name", ["x86-64-avx512vnni", AARCH64])
def test_nan_has_one_code_everywhere(name):
    problem = Quantize((67,))
    d = data(problem, 2)
    d["x"][:] = np.nan
    (got,) = run(name, [(problem, d)])
    assert (got == d["qzero"][0]).all()


@pytest.mark.parametrize("name", ["x86-64-avx2", AARCH64])
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


@settings(max_examples=200, deadline=None)
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
