"""Data movement against NumPy, exactly, in every element type, and on all targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mpq_compiler.backends.tvm.kernels.cpu import movement
from mpq_compiler.backends.tvm.kernels.problems import movement as problems
from mpq_compiler.backends.tvm.kernels.problems.movement import Gather, Movement, TokenRow
from mpq_compiler.ir import ops
from tests.harness.float_kernels import TARGETS, Case, Suite, shape_of

BATCH = 2
IMAGE = ("B", 7, 5, 33)
# name: problem, its meaning in NumPy
PROBLEMS: dict[str, tuple[Movement, Any]] = {
    "upsample 2": (problems.upsample(IMAGE, (2, 2)), lambda x: x.repeat(2, 1).repeat(2, 2)),
    "upsample 2x3 u8": (problems.upsample(IMAGE, (2, 3), "uint8"), lambda x: x.repeat(2, 1).repeat(3, 2)),
    "concat channels": (
        problems.concat([IMAGE, ("B", 7, 5, 20), ("B", 7, 5, 1)], -1), lambda *x: np.concatenate(x, -1)
    ),
    "concat tokens u8": (problems.concat([("B", 4, 9), ("B", 1, 9)], 1, "uint8"), lambda *x: np.concatenate(x, 1)),
    "to channels first": (problems.permute(IMAGE, (0, 3, 1, 2)), lambda x: x.transpose(0, 3, 1, 2)),
    "to channels last": (problems.permute(("B", 3, 7, 5), (0, 2, 3, 1)), lambda x: x.transpose(0, 2, 3, 1)),
    "unpatchify": (
        problems.permute(("B", 3, 4, 2, 2, 5), (0, 1, 3, 2, 4, 5)), lambda x: x.transpose(0, 1, 3, 2, 4, 5)
    ),
    "slice": (
        problems.slice_(IMAGE, (0, 1, 0, 3), (0, 6, 5, 33), (1, 2, 1, 1)), lambda x: x[:, 1:6:2, :, 3:]
    ),
    "half of the channels": (problems.slice_(IMAGE, (0, 0, 0, 0), (0, 7, 5, 16)), lambda x: x[..., :16]),
    "expand with batch": (
        problems.expand((1, 5, 1), IMAGE), lambda x: np.broadcast_to(x, (BATCH, 7, 5, 33))
    ),
    "expand pixels": (
        problems.expand(("B", 1, 1, 33), IMAGE), lambda x: np.broadcast_to(x, (BATCH, 7, 5, 33))
    ),
    "pad": (
        problems.pad(IMAGE, (0, 1, 0, 0), (0, 0, 2, 0), 3.5),
        lambda x: np.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0)), constant_values=3.5),
    ),
    "pad i64": (
        problems.pad(("B", 3), (0, 1), (0, 1), 7, "int64"),
        lambda x: np.pad(x, ((0, 0), (1, 1)), constant_values=7),
    ),
    "no batch": (problems.permute((5, 37), (1, 0)), lambda x: x.T),
    "turned": (problems.permute(("B", 3, 18, 37), (0, 3, 1, 2)), lambda x: x.transpose(0, 3, 1, 2)),
    "turned, rows within": (problems.permute(("B", 17, 3, 20), (0, 3, 2, 1)), lambda x: x.transpose(0, 3, 2, 1)),
    "four channels to last": (problems.permute(("B", 4, 7, 5), (0, 2, 3, 1)), lambda x: x.transpose(0, 2, 3, 1)),
    "four channels to first": (problems.permute(("B", 7, 5, 4), (0, 3, 1, 2)), lambda x: x.transpose(0, 3, 1, 2)),
}  # fmt: skip
GATHERS = {
    "class embedding": Gather(10, 24),
    "tokens": Gather(50, 33, (7,), "float32"),
    "half": Gather(9, 20, (), "float16"),
    "half as float": Gather(11, 37, (5,), stored="float16"),
}


def _inputs(name: str) -> list[np.ndarray]:
    rng = np.random.default_rng(len(name))
    arguments = problems.arguments(PROBLEMS[name][0])[:-1]
    return [rng.integers(0, 200, shape_of(a, BATCH)).astype(a.dtype) for a in arguments]


def _gather_inputs(problem: Gather) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    index, table, _ = problems.arguments(problem)
    return [
        rng.integers(0, problem.rows, shape_of(index, BATCH)),
        rng.standard_normal(shape_of(table, BATCH)).astype(table.dtype),
    ]


TOKEN_ROWS = {
    "row of a token": TokenRow(7, 33, 5),
    "row of the largest": TokenRow(9, 16),
    "row of half": TokenRow(4, 20, 5, "float16", "int32"),
}


def _token_inputs(problem: TokenRow) -> list[np.ndarray]:
    """Tokens of which some are equal, the wanted one among them, in one sample not."""
    rng = np.random.default_rng(problem.rows)
    tokens, x, _ = problems.arguments(problem)
    given = rng.integers(3, 7, shape_of(tokens, BATCH)).astype(problem.token_dtype)
    given[-1] = 3
    return [given, rng.standard_normal(shape_of(x, BATCH)).astype(problem.dtype)]


def _case(problem: Movement | Gather | TokenRow, inputs: list[np.ndarray]) -> Case:
    return Case(lambda isa, n: movement.build(problem, isa, n), problems.arguments(problem), inputs, BATCH)


SUITE = Suite(
    {name: _case(problem, _inputs(name)) for name, (problem, _) in PROBLEMS.items()}
    | {name: _case(problem, _gather_inputs(problem)) for name, problem in GATHERS.items()}
    | {name: _case(problem, _token_inputs(problem)) for name, problem in TOKEN_ROWS.items()}
)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_same_bits(target: str) -> None:
    SUITE.check_same_bits(target)


@pytest.mark.parametrize("name", PROBLEMS)
def test_moves(name: str) -> None:
    expected = PROBLEMS[name][1](*_inputs(name))
    np.testing.assert_array_equal(SUITE.first[name], expected)


@pytest.mark.parametrize("name", GATHERS)
def test_gathers(name: str) -> None:
    index, table = _gather_inputs(GATHERS[name])
    np.testing.assert_array_equal(SUITE.first[name], table[index])


@pytest.mark.parametrize("name", TOKEN_ROWS)
def test_takes_the_row_of_a_token(name: str) -> None:
    tokens, x = _token_inputs(problem := TOKEN_ROWS[name])
    expected = ops.row_of_token(torch.from_numpy(x), torch.from_numpy(tokens), problem.token)
    np.testing.assert_array_equal(SUITE.first[name], expected.numpy())


def test_an_index_out_of_range_reads_the_nearest_row() -> None:
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    suite = Suite({"gather": _case(Gather(3, 2), [np.array([-5, 1 << 20]), table])})
    np.testing.assert_array_equal(suite.first["gather"], table[[0, 2]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: problems.permute(IMAGE, (1, 0, 2, 3)), "batch must stay"),
        (lambda: problems.concat([IMAGE, IMAGE], 0), "cannot be concatenated"),
        (lambda: problems.expand((3,), IMAGE), "does not broadcast"),
    ],
)
def test_movements_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
