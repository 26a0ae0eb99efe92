"""Pointwise programs against NumPy and torch, broadcasting of every kind, and the same bits on all targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpq_compiler.backends.tvm.kernels.cpu import pointwise
from mpq_compiler.backends.tvm.kernels.problems import pointwise as problems
from mpq_compiler.backends.tvm.kernels.problems.pointwise import Input, PointwiseProgram, PointwiseStep, Result, Window
from mpq_compiler.backends.tvm.kernels.problems.strides import merge_dimensions
from tests.harness.float_kernels import TARGETS, Case, Suite, error, quantized, quantizer_inputs, shape_of

BATCH = 3


def _step(op: str, *args: Any, value: int | None = None) -> PointwiseStep:
    return PointwiseStep(op, args, value)


def _f32(*shapes: tuple) -> tuple:
    return tuple((shape, "float32") for shape in shapes)


X = [Input(i) for i in range(8)]
R = [Result(i) for i in range(8)]
IMAGE = ("B", 17, 5, 33)
# name: program, its meaning in torch (float64 tensors in, one out)
PROGRAMS: dict[str, tuple[PointwiseProgram, Any]] = {
    "residual": (
        PointwiseProgram(_f32(IMAGE, IMAGE), (_step("add", X[0], X[1]), _step("mul", R[0], 0.5)), IMAGE),
        lambda x, y: (x + y) * 0.5,
    ),
    "modulate": (
        PointwiseProgram(
            _f32(IMAGE, ("B", 1, 1, 33), (33,)),
            (_step("add", X[1], 1.0), _step("mul", X[0], R[0]), _step("add", R[1], X[2]), _step("silu", R[2])),
            IMAGE,
        ),
        lambda x, s, c: F.silu(x * (s + 1) + c),
    ),
    "pixels": (
        PointwiseProgram(
            _f32(IMAGE, (17, 1, 1), ("B", 1, 5, 1), (1,)),
            (_step("mul", X[0], X[1]), _step("sub", R[0], X[2]), _step("div", R[1], X[3])),
            IMAGE,
        ),
        lambda x, h, w, s: (x * h - w) / s,
    ),
    "eight inputs": (
        PointwiseProgram(
            _f32(*[("B", 2, 70) if i % 2 else ("B", 1, 70) for i in range(8)]),
            (_step("add", X[0], X[1]), *(_step("add", R[i], X[i + 2]) for i in range(6))),
            ("B", 2, 70),
        ),
        lambda *x: sum(x),
    ),
    "timestep embedding": (
        PointwiseProgram(
            ((("B", 1), "int64"), ((24,), "float32")),
            (_step("cast", X[0]), _step("mul", R[0], X[1]), _step("sin", R[1])),
            ("B", 24),
        ),
        lambda t, f: torch.sin((t.float() * f.float()).double()),
    ),
    "geglu": (
        PointwiseProgram(
            _f32(("B", 9, 40), ("B", 9, 40)), (_step("gelu", X[1]), _step("mul", X[0], R[0])), ("B", 9, 40)
        ),
        lambda x, g: x * F.gelu(g),
    ),
    "half": (
        PointwiseProgram(((("B", 35), "float16"), ((35,), "float16")), (_step("mul", X[0], X[1]),), ("B", 35)),
        lambda x, y: x * y,
    ),
    "vector": (
        PointwiseProgram(_f32(("B",)), (_step("square", X[0]), _step("rsub", R[0], 1.0)), ("B",)),
        lambda x: 1 - x * x,
    ),
    "to integers": (
        PointwiseProgram(_f32(("B", 21)), (_step("mul", X[0], 100.0),), ("B", 21), dtype="int64"),
        lambda x: (x.float() * 100).long(),
    ),
    "to half": (
        PointwiseProgram(_f32(("B", 21)), (_step("neg", X[0]),), ("B", 21), dtype="float16"),
        lambda x: -x.half(),
    ),
    "no batch": (PointwiseProgram(_f32((6, 7), (7,)), (_step("maximum", X[0], X[1]),), (6, 7)), torch.maximum),
    "where a mask is set": (
        PointwiseProgram(
            ((("B", 7, 1), "bool"), (("B", 7, 33), "float32"), ((7, 33), "float32")),
            (_step("cast", X[0]), _step("where", R[0], X[1], X[2])), ("B", 7, 33),
        ),
        lambda m, x, y: torch.where(m, x, y),
    ),
    "comparisons": (
        PointwiseProgram(
            _f32(("B", 19), (19,)),
            (_step("lt", X[0], X[1]), _step("ge", X[0], 0.5), _step("mul", R[0], 2.0), _step("add", R[2], R[1])),
            ("B", 19),
        ),
        lambda x, y: (x < y) * 2.0 + (x >= 0.5) * 1.0,
    ),
    "a part of the channels": (
        PointwiseProgram(
            _f32(("B", 9, 20), ("B", 9, 1)), (_step("silu", X[0]), _step("mul", R[0], X[1])), ("B", 9, 20),
            windows=(Window(("B", 9, 53), (0, 53, 1), 33), None),
        ),
        lambda x, s: F.silu(x[..., 33:]) * s,
    ),
    "every second channel": (
        PointwiseProgram(
            _f32(("B", 9, 17), (9, 17)), (_step("neg", X[0]), _step("add", R[0], X[1])), ("B", 9, 17),
            windows=(Window(("B", 9, 34), (0, 34, 2), 1), Window((9, 34), (34, 2))),
        ),
        lambda x, y: y[:, ::2] - x[..., 1::2],
    ),
    "rotary embedding": (
        PointwiseProgram(
            _f32(("B", 7, 3, 22), (1, 7, 1, 22), (1, 7, 1, 22)),
            (_step("rotate", X[0]), _step("mul", R[0], X[2]), _step("mul", X[0], X[1]), _step("add", R[1], R[2])),
            ("B", 7, 3, 22),
        ),
        lambda x, c, s: x * c + torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2) * s,
    ),
    "rotated pairs": (
        PointwiseProgram(_f32(("B", 9, 2)), (_step("rotate", X[0]),), ("B", 9, 2)),
        lambda x: torch.stack([-x[..., 1], x[..., 0]], -1),
    ),
    "another order": (
        PointwiseProgram(
            _f32(("B", 5, 21)), (_step("relu", X[0]),), ("B", 5, 21), windows=(Window(("B", 21, 5), (0, 1, 5)),)
        ),
        lambda x: F.relu(x.transpose(1, 2)),
    ),
    "diamond": (
        PointwiseProgram(
            _f32(("B", 50)),
            (_step("tanh", X[0]), _step("sigmoid", X[0]), _step("minimum", R[0], R[1]), _step("mul", R[2], R[0])),
            ("B", 50),
        ),
        lambda x: torch.minimum(torch.tanh(x), torch.sigmoid(x)) * torch.tanh(x),
    ),
}  # fmt: skip
QUANTIZED = ("residual", "modulate")


def _inputs(name: str) -> list[np.ndarray]:
    rng = np.random.default_rng(len(name))
    inputs = []
    for argument in problems.arguments(PROGRAMS[name][0])[:-1]:
        shape = shape_of(argument, BATCH)
        highest = {"int64": 1000, "bool": 2}.get(argument.dtype)
        value = rng.integers(0, highest, shape) if highest else rng.standard_normal(shape)
        inputs.append(np.ascontiguousarray(value).astype(argument.dtype).reshape(shape))
    return inputs


def _case(program: PointwiseProgram, inputs: list[np.ndarray]) -> Case:
    return Case(lambda isa, n: pointwise.build(program, isa, n), problems.arguments(program), inputs, BATCH)


def _exact(name: str) -> np.ndarray:
    tensors = [torch.from_numpy(v) for v in _inputs(name)]
    return PROGRAMS[name][1](*(t.double() if t.is_floating_point() else t for t in tensors)).numpy()


def _quantizing(name: str) -> tuple[PointwiseProgram, list[np.ndarray]]:
    plain = PROGRAMS[name][0]
    last = _step("quantize", Result(len(plain.steps) - 1), value=8)
    program = PointwiseProgram(plain.inputs, (*plain.steps, last), plain.shape, time_groups=2)
    return program, [*_inputs(name), *quantizer_inputs(_exact(name), 2, 8)]


def _nan() -> tuple[PointwiseProgram, list[np.ndarray]]:
    inputs = _inputs("diamond")
    inputs[0][1, 7] = np.nan
    return PROGRAMS["diamond"][0], inputs


SUITE = Suite(
    {name: _case(program, _inputs(name)) for name, (program, _) in PROGRAMS.items()}
    | {f"{name} quantized": _case(*_quantizing(name)) for name in QUANTIZED}
    | {"nan": _case(*_nan())}
)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_same_bits(target: str) -> None:
    SUITE.check_same_bits(target)


@pytest.mark.parametrize("name", PROGRAMS)
def test_against_torch(name: str) -> None:
    assert error(SUITE.first[name], _exact(name)) <= 1e-6


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantizes_its_own_result(name: str) -> None:
    scale, zero, group = _quantizing(name)[1][-3:]
    assert (SUITE.first[f"{name} quantized"] == quantized(SUITE.first[name], scale, zero, group, 8)).all()


def test_nan_reaches_its_element_only() -> None:
    where = np.argwhere(np.isnan(SUITE.first["nan"]))
    assert where.tolist() == [[1, 7]]


@pytest.mark.parametrize(
    ("extents", "strides", "sizes"),
    [
        ((17, 5, 33), ((165, 33, 1), (165, 33, 1)), [2805]),
        ((17, 5, 33), ((165, 33, 1), (0, 0, 1)), [85, 33]),
        ((17, 5, 33), ((165, 33, 1), (1, 0, 0)), [17, 165]),
        ((1, 1, 1), ((0, 0, 0),), [1]),
        ((4, 1, 6), ((6, 6, 1), (6, 0, 1)), [24]),
    ],
)
def test_merge_dimensions(extents: tuple, strides: tuple, sizes: list[int]) -> None:
    merged, steps = merge_dimensions(extents, strides)
    assert merged == sizes
    for before, after in zip(strides, steps, strict=True):
        visited = [sum(i * s for i, s in zip(at, before, strict=True)) for at in np.ndindex(*extents)]
        assert visited == [sum(i * s for i, s in zip(at, after, strict=True)) for at in np.ndindex(*merged)]


@pytest.mark.parametrize(
    ("inputs", "steps", "shape", "message"),
    [
        (_f32(("B", 3)), (_step("relu", X[0]),), ("B", 4), "does not broadcast"),
        (_f32((3, "B")), (_step("relu", X[0]),), (3, "B"), "must be the first"),
        (_f32((3,)), (_step("quantize", X[0], value=8),), (3,), "needs a batch"),
        (_f32(("B", 3)), (_step("rotate", X[0]),), ("B", 3), "no row of pairs"),
    ],
)
def test_programs_that_make_no_sense(inputs: tuple, steps: tuple, shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointwiseProgram(inputs, steps, shape)
