"""Vector math against float64 over the range of float32, special values, and the same bits on all targets."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.cpu import pointwise
from mpq_compiler.backends.tvm.kernels.problems import pointwise as problems
from mpq_compiler.backends.tvm.kernels.problems.pointwise import Input, PointwiseProgram, PointwiseStep
from tests.harness.float_kernels import TARGETS, Case, Suite, quantized

F64 = torch.float64


def _torch(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: function(torch.from_numpy(x.astype(np.float64))).numpy()


EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _torch(torch.nn.functional.silu),
    "gelu": _torch(torch.nn.functional.gelu),
    "gelu_tanh": _torch(lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    "sigmoid": _torch(torch.sigmoid),
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "exp": np.exp,
    "log": np.log,
    "erf": _torch(torch.erf),
    "sin": np.sin,
    "cos": np.cos,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "neg": np.negative,
    "square": np.square,
    "binade": lambda x: np.where(np.abs(x) < 2.0**-126, 0, 2.0 ** np.floor(np.log2(np.maximum(np.abs(x), 2.0**-126)))),
}
# (bound of |y - y'| / max(1, |x|), bound of |y - y'| / |y'|): the error must meet one of them
BOUNDS = {
    "silu": (1.5e-7, 0), "gelu": (2.5e-7, 0), "gelu_tanh": (1.5e-7, 0), "sigmoid": (1.2e-7, 0), "tanh": (3e-7, 4e-7),
    "relu": (0, 0), "exp": (0, 1.3e-7), "log": (0, 2e-7), "erf": (2.5e-7, 0), "sin": (1.2e-7, 0),
    "cos": (1.2e-7, 0), "sqrt": (0, 6e-8), "rsqrt": (0, 1.2e-7), "neg": (0, 0), "square": (0, 6e-8),
    "binade": (0, 0),
}  # fmt: skip
POSITIVE = ("log", "sqrt", "rsqrt")
SAMPLES = 1 << 15


def _arguments(name: str) -> np.ndarray:
    """Everything where a function changes, bit patterns of the whole range, and special values."""
    rng = np.random.default_rng(7)
    near = rng.uniform(-12, 12, SAMPLES // 2)
    far = rng.uniform(-1e4, 1e4, SAMPLES // 4) if name in ("sin", "cos") else rng.uniform(-110, 110, SAMPLES // 4)
    bits = rng.integers(0, 1 << 32, SAMPLES, dtype=np.uint64).astype(np.uint32).view(np.float32)
    limit = 1e4 if name in ("sin", "cos") else 1e18 if name == "square" else 3e38
    whole = bits[np.isfinite(bits) & (np.abs(bits) < limit)]
    x = np.concatenate([near, far, whole])[:SAMPLES].astype(np.float32)
    x = np.abs(x) if name in POSITIVE else x
    return np.concatenate([x, np.zeros((-len(x)) % 16, np.float32)]).reshape(-1, 16)


def _case(name: str, x: np.ndarray) -> Case:
    program = PointwiseProgram(
        ((("B", x.shape[1]), "float32"),), (PointwiseStep(name, (Input(0),)),), ("B", x.shape[1])
    )
    return Case(lambda isa, n: pointwise.build(program, isa, n), problems.arguments(program), [x], x.shape[0])


SPECIAL = np.float32([np.nan, np.inf, -np.inf, 0, -0.0, 1e-40, -1e-40, 88.7, -103, 3e38, -3e38, *[1] * 5])
SCALAR = ("silu", "exp", "log", "sin")  # also run one lane at a time
SUITE = Suite(
    {name: _case(name, np.vstack([_arguments(name), SPECIAL])) for name in vmath.UNARY}
    | {f"{name}-lane": _case(name, _arguments(name)[:200].reshape(-1, 1)) for name in SCALAR}
)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_same_bits(target: str) -> None:
    SUITE.check_same_bits(target)


@pytest.mark.parametrize("name", vmath.UNARY)
def test_accuracy(name: str) -> None:
    x, value = _arguments(name), SUITE.first[name][:-1]
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        exact = EXACT[name](x.astype(np.float64)).astype(np.float32).astype(np.float64)
        difference = np.abs(value.astype(np.float64) - exact)
    difference[np.isinf(exact) & (value == exact)] = 0
    absolute, relative = BOUNDS[name]
    finite = np.where(np.isfinite(exact), np.abs(exact), 0)
    size = np.abs(x) if name in ("silu", "gelu", "gelu_tanh") else 1.0
    allowed = np.maximum(absolute * np.maximum(1, size), relative * finite)
    # one unit of the smallest denormal is as near as a denormal can be
    excess = difference - allowed - 1.5e-45
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert (excess <= 0).all(), (name, x[worst], value[worst], exact[worst])


@pytest.mark.parametrize("name", SCALAR)
def test_lanes_do_not_matter(name: str) -> None:
    vectors = SUITE.first[name][:200].reshape(-1, 1)
    assert (vectors.view(np.int32) == SUITE.first[f"{name}-lane"].view(np.int32)).all()


@pytest.mark.parametrize("name", vmath.UNARY)
def test_special_values(name: str) -> None:
    nan, inf, minus_inf, zero, *_ = SUITE.first[name][-1]
    if name == "binade":
        assert nan == math.inf  # its exponent
    else:
        assert math.isnan(nan), "NaN must pass through"
    with np.errstate(all="ignore"):
        if name not in ("sin", "cos"):
            np.testing.assert_allclose(inf, EXACT[name](np.float64(np.inf)[None])[0], rtol=1e-6)
            expected = EXACT[name](np.float64(-np.inf)[None])[0]
            if name in ("silu", "gelu", "gelu_tanh", "sigmoid"):
                expected = 0.0  # the limit; torch's own formula may give NaN
            np.testing.assert_allclose(minus_inf, expected, rtol=1e-6, atol=1e-30)
        else:
            assert math.isnan(inf) and math.isnan(minus_inf)
        np.testing.assert_allclose(zero, EXACT[name](np.zeros(1))[0], atol=1e-7)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_quantize_ties_limits_and_nan(bits: int) -> None:
    scale, zero = np.array([0.5, 0.1], np.float32), np.array([0, 2**bits - 1], np.int32)
    group = np.array([0, 1, 1, 1], np.int64)
    ties = (np.arange(-300, 300) / 4).astype(np.float32)
    row = np.concatenate([ties, np.array([np.inf, -np.inf, 3e38, -3e38, 1e-40, -0.0], np.float32)])
    x = np.stack([row, row, row * np.float32(0.1), np.full_like(row, np.nan)])
    program = PointwiseProgram(
        ((("B", x.shape[1]), "float32"),),
        (PointwiseStep("quantize", (Input(0),), bits),),
        ("B", x.shape[1]),
        time_groups=2,
    )
    arguments = problems.arguments(program)
    suite = Suite({
        "q": Case(lambda isa, n: pointwise.build(program, isa, n), arguments, [x, scale, zero, group], 4)
    })  # fmt: skip
    codes = suite.first["q"]
    with np.errstate(over="ignore"):
        assert (codes[:3] == quantized(x[:3], scale, zero, group[:3], bits)).all()
    assert (codes[3] == zero[group[3]]).all()
