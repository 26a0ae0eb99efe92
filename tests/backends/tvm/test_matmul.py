"""Products of activations against NumPy's einsum in float64, in every order of dimensions, and bits on all targets."""

from __future__ import annotations

import numpy as np
import pytest

from mpq_compiler.backends.tvm.kernels.cpu import matmul
from mpq_compiler.backends.tvm.kernels.problems import matmul as problems
from mpq_compiler.backends.tvm.kernels.problems.matmul import Access, Matmul
from tests.harness.float_kernels import TARGETS, Case, Suite, error, random_inputs

H, T, D = 3, 37, 11


def _access(letters: str, order: str, sizes: dict[str, int], **more: bool) -> Access:
    """How an operand whose dimensions lie as `letters` is read in `order`."""
    strides, step = {}, 1
    for letter in reversed(letters):
        strides[letter] = step
        step *= sizes[letter]
    return Access(tuple(sizes[letter] for letter in letters), tuple(strides[letter] for letter in order), **more)


def _problem(left: str, right: str, result: str, m: int, k: int, n: int, **more: bool) -> Matmul:
    sizes = {"h": H, "m": m, "k": k, "n": n}
    heads = "h" if "h" in result else ""
    return Matmul(
        tuple(sizes[letter] for letter in heads), m, k, n, _access(left, f"{heads}mk", sizes),
        _access(right, f"{heads}kn", sizes, **more), _access(result, f"{heads}mn", sizes),
    )  # fmt: skip


# name: (dimensions of the left operand, of the right, of the result), problem
PROBLEMS: dict[str, tuple[tuple[str, str, str], Matmul]] = {
    name: (letters, _problem(*letters, *sizes))
    for name, (letters, sizes) in {
        "plain": (("hmk", "hkn", "hmn"), (T, D, 50)),
        "no heads": (("mk", "kn", "mn"), (5, 7, 33)),
        "keys and values": (("khm", "khn", "hmn"), (D + 1, T, D)),
        "queries": (("mhk", "hnk", "mhn"), (T, D, D + 1)),
        "both transposed": (("hkm", "hnk", "hmn"), (19, 5, 70)),
        "many terms": (("hmk", "hkn", "hmn"), (4, 1100, 17)),
        "one column": (("hmk", "hkn", "hmn"), (6, 300, 1)),
        "one row": (("hmk", "hkn", "hmn"), (1, 3, 129)),
    }.items()
}
BATCH = 2


def _case(problem: Matmul) -> Case:
    inputs = random_inputs(problems.arguments(problem), BATCH, problem.terms)
    return Case(lambda isa, n: matmul.build(problem, isa, n), problems.arguments(problem), inputs, BATCH)


def _shared() -> Matmul:
    """A right operand without a batch."""
    return _problem("hmk", "hkn", "hmn", 5, 9, 21, batched=False)


def _window() -> Matmul:
    """Half of the terms and half of the columns of the operands' buffers."""
    left, right, result = (
        Access((6, 8), (8, 1), offset=4),
        Access((8, 40), (40, 1), offset=4 * 40 + 20),
        Access((6, 20), (20, 1)),
    )
    return Matmul((), 6, 4, 20, left, right, result)


SUITE = Suite(
    {name: _case(problem) for name, (_, problem) in PROBLEMS.items()}
    | {"shared": _case(_shared()), "window": _case(_window())}
)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_same_bits(target: str) -> None:
    SUITE.check_same_bits(target)


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_float64(name: str) -> None:
    left, right, result = PROBLEMS[name][0]
    a, b = (value.astype(np.float64) for value in SUITE.cases[name].inputs)
    assert error(SUITE.first[name], np.einsum(f"b{left},b{right}->b{result}", a, b)) <= 1e-6


def test_an_operand_of_all_samples() -> None:
    a, b = (value.astype(np.float64) for value in SUITE.cases["shared"].inputs)
    assert error(SUITE.first["shared"], a @ b) <= 1e-6


def test_a_part_of_the_operands() -> None:
    a, b = (value.astype(np.float64) for value in SUITE.cases["window"].inputs)
    assert error(SUITE.first["window"], a[:, :, 4:] @ b[:, 4:, 20:]) <= 1e-6


def test_columns_of_the_result_are_neighbours() -> None:
    with pytest.raises(ValueError, match="must be neighbours"):
        _problem("hmk", "hkn", "hnm", 4, 5, 6)
