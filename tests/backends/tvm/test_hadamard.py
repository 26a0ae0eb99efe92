"""Rotations of channels: the bits of the reference on every CPU target, and the codes of what they give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpq_compiler.backends.tvm.kernels.cpu import hadamard
from mpq_compiler.backends.tvm.kernels.problems import hadamard as problems
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.hadamard import Hadamard
from mpq_compiler.ir import ops
from tests.harness.float_kernels import TARGETS, Case, Suite, quantized, quantizer_inputs, random_inputs, same_bits

PROBLEMS = {
    f"{positions}x{channels} by {block}": Hadamard(positions, channels, block)
    for positions, channels, block in (
        (1, 2, 2), (7, 12, 4), (5, 24, 8), (196, 48, 16), (3, 96, 32), (9, 64, 64), (5, 320, 64), (4, 384, 128),
        (2, 768, 256), (1, 1024, 1024), (6, 64, 4),
    )
}  # fmt: skip
QUANTIZED = ("7x12 by 4", "196x48 by 16", "2x768 by 256")
ADDED = Epilogue((Step("add", operand=0), Step("silu")), (Operand("sample"),))
BATCH, GROUPS = 3, 2


def _inputs(name: str) -> list[np.ndarray]:
    (x,) = random_inputs(problems.arguments(PROBLEMS[name]), BATCH, len(name))
    x *= np.exp(3 * np.random.default_rng(1).standard_normal(x.shape[-1])).astype(np.float32)  # channels unlike others
    return [x]


def _case(problem: Hadamard, inputs: list[np.ndarray]) -> Case:
    return Case(lambda isa, n: hadamard.build(problem, isa, n), problems.arguments(problem), inputs, BATCH)


def _expected(name: str) -> np.ndarray:
    return ops.hadamard(torch.from_numpy(_inputs(name)[0]), PROBLEMS[name].block).numpy()


def _quantizing(name: str) -> tuple[Hadamard, list[np.ndarray]]:
    problem = replace(PROBLEMS[name], epilogue=Epilogue((Step("quantize", value=4),)), time_groups=GROUPS)
    return problem, [*_inputs(name), *quantizer_inputs(_expected(name), GROUPS, 4)]


def _special() -> np.ndarray:
    """Zeros of both signs, denormals, the largest floats, an infinity, a NaN; one each in a row of its own."""
    x = np.zeros((BATCH, 7, 12), np.float32)
    x[:, range(7), range(7)] = [-0.0, 1e-41, 3e38, -3e38, np.inf, np.nan, 1.0]
    return x


WITH_STEPS = replace(PROBLEMS["5x24 by 8"], epilogue=ADDED)
SUITE = Suite(
    {name: _case(problem, _inputs(name)) for name, problem in PROBLEMS.items()}
    | {f"{name} quantized": _case(*_quantizing(name)) for name in QUANTIZED}
    | {"special": _case(PROBLEMS["7x12 by 4"], [_special()])}
    | {"steps": _case(WITH_STEPS, random_inputs(problems.arguments(WITH_STEPS), BATCH, 2))}
)


@pytest.mark.parametrize("target", TARGETS[1:])
@pytest.mark.invariant("trdq-5")
def test_same_bits(target: str) -> None:
    SUITE.check_same_bits(target)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.invariant("trdq-5")
def test_they_are_those_of_the_reference(name: str) -> None:
    assert same_bits(SUITE.first[name], _expected(name))


def test_special_values() -> None:
    assert same_bits(SUITE.first["special"], ops.hadamard(torch.from_numpy(_special()), 4).numpy())


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.invariant("trdq-5")
def test_codes_of_what_is_rotated(name: str) -> None:
    expected = quantized(_expected(name), *_quantizing(name)[1][1:], 4)
    assert len(np.unique(expected)) == 16
    assert (SUITE.first[f"{name} quantized"] == expected).all()


def test_blocks_must_divide_the_channels() -> None:
    for channels, block in ((48, 32), (48, 12), (48, 1)):
        with pytest.raises(ValueError, match=f"{channels} channels do not divide into blocks of {block}"):
            Hadamard(5, channels, block)
