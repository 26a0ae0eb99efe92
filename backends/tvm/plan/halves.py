"""What kernels of a GPU hand on in half precision: the stream that norms read and that products and attentions add to.

What they compute stays in float32, of values that had 24 bits and have 11: half of the bytes go through memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from mpq_compiler.backends.tvm.kernels.problems.argument import HALF
from mpq_compiler.backends.tvm.plan.calls import Call, Function, Kernel

ARGUMENTS = {
    "gemm": r"operand\d+|out(_\d+)?|full",
    "weight_only": r"operand\d+|y",
    "float_gemm": r"operand\d+|y",
    "attention": r"operand\d+|y",
    "fast_attention": r"operand\d+|y",
    "norms": r"x\d*|operand\d+|y",
    "hadamard": r"x|operand\d+|y",
    "quantize": r"x\d*",
    "rounding": "x",
    "pointwise": r"x\d+|y",
    "movement": r"x\d+|y",
}
"""By template the arguments that its kernels have in half precision as well as in float32."""
_OTHERS = ("movement.Gather", "movement.TokenRow", "fast_attention.Ready")
"""Problems of these templates with other arguments."""


def store_halves(function: Function) -> Function:
    """Let what is in float32 between kernels that all have it in half precision too be in that."""
    chosen = {v.name for v in function.made if v.dtype == "float32" and v.batched and len(v.inner) > 1}
    chosen -= {function.output.name, *(value.name for part in function.parts for value in part.outputs)}
    for call in function.calls:
        chosen.difference_update(name for argument, name in _values(call) if not _can_be_half(call.kernel, argument))

    def changed(call: Call) -> Call:
        halves = tuple(sorted(argument for argument, name in _values(call) if name in chosen))
        return replace(call, kernel=replace(call.kernel, halves=halves))

    made = tuple(replace(v, dtype=HALF) if v.name in chosen else v for v in function.made)
    return replace(function.mapped(changed), made=made)


def _values(call: Call) -> Iterator[tuple[str, str]]:
    """The values that a call reads and makes, by its arguments; of a part of a value that value."""
    yield from call.operands
    yield from ((argument, call.into or name) for argument, name in call.results)


def _can_be_half(kernel: Kernel, argument: str) -> bool:
    """Whether a kernel has an argument in half precision as well as in float32."""
    known = "" if kernel.problem.type in _OTHERS else ARGUMENTS.get(kernel.template, "")
    return re.fullmatch(known, argument) is not None
