"""The place of a token among those of a text, by which CLIP pools it."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from mpq_compiler.backends.tvm.kernels.common.template import store
from mpq_compiler.backends.tvm.kernels.problems.movement import TokenRow


def place_of_token(problem: TokenRow, tokens: Buffer, first: Expr | int, place: Buffer) -> Expr:
    """The place int32 of a sample's token, found from its end, so that of equal ones the first is left.

    Args:
        problem: says which token.
        tokens: the buffer of tokens.
        first: the index of the sample's first one.
        place: a buffer int32 [1], to count in.
    """
    store(place, tirx.IntImm("int32", 0 if problem.token is not None else problem.rows - 1), 0)
    with T.serial(0, problem.rows) as step:
        i = problem.rows - 1 - step
        here = tokens[first + i]
        if problem.token is None:
            found = here >= tokens[first + place[0]]
        else:
            found = tirx.EQ(here, tirx.IntImm(problem.token_dtype, problem.token))
        store(place, tirx.Select(found, i, place[0]), 0)
    return place[0]
