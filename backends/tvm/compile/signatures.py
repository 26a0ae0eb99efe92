"""What kernels take and yield, against the values of a plan. Imports TVM: for workers and tests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from mpq_compiler.backends.tvm import templates
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.plan.calls import BATCH, Call, Kernel, Lowered
from mpq_compiler.targets.table import Target

BATCHES = (2, 3)
"""Batch sizes at which sizes are compared."""

Shape = Sequence[int | str]
Known = dict[str, tuple[Shape, str]]
"""Shape and element type of values by name."""


def check(lowered: Lowered, target: Target) -> list[tuple[str, str]]:
    """(node, what is wrong) of every call whose operands or results are not what its kernel takes or yields."""
    signatures = {kernel: templates.arguments(kernel, target) for kernel in lowered.kernels()}
    return list(_findings(lowered, signatures))


def _findings(
    lowered: Lowered, signatures: Mapping[Kernel, tuple[list[Argument], list[Argument]]]
) -> Iterator[tuple[str, str]]:
    static: Known = {value.name: (value.shape, value.dtype) for value in lowered.stored}
    for call in lowered.preparation:
        yield from _of_call(call, static, *signatures[call.kernel])
        outputs = {a.name: a for a in signatures[call.kernel][1]}
        static |= {n: (outputs[a].shape, outputs[a].dtype) for a, n in call.results if a in outputs}
    for function in lowered.functions:
        own = (*function.inputs, *function.made)
        known = static | {value.name: (value.shape, value.dtype) for value in own}
        for call in function.calls:
            yield from _of_call(call, known, *signatures[call.kernel])


def _of_call(
    call: Call, known: Known, inputs: Sequence[Argument], outputs: Sequence[Argument]
) -> Iterator[tuple[str, str]]:
    operands, results = dict(call.operands), dict(call.results)
    expected, yielded = {a.name: a for a in inputs}, {a.name: a for a in outputs}
    if operands.keys() != expected.keys():
        yield call.node, f"{call.kernel.template} takes {', '.join(expected)}, and is given {', '.join(operands)}"
    if not results.keys() <= yielded.keys():
        yield call.node, f"{call.kernel.template} yields {', '.join(yielded)}, and {', '.join(results)} are asked for"
    made = {argument: call.into or name for argument, name in results.items()}
    for argument, name in {**operands, **made}.items():
        wanted = (expected | yielded).get(argument)
        if wanted is None or name not in known:
            continue
        shape, dtype = known[name]
        if dtype != wanted.dtype:
            yield call.node, f"'{name}' is {dtype}, where {call.kernel.template} has '{argument}' of {wanted.dtype}"
        elif any(_size(shape, batch) != _size(wanted.shape, batch) for batch in BATCHES):
            yield call.node, f"'{name}' {_text(shape)} is no '{argument}' {_text(wanted.shape)}"


def _size(shape: Shape, batch: int) -> int:
    return math.prod(batch if extent == BATCH else int(extent) for extent in shape)


def _text(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
