"""Calls that move data: as a copy, or as no call at all where only the shape changes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from mpq_compiler.aten import aten, is_permute
from mpq_compiler.backends.tvm.emitter import Emitter, elements, filled
from mpq_compiler.backends.tvm.lowered import BATCH, Kernel, Record, Shape, Value, record
from mpq_compiler.program import arguments, operand


def alias(e: Emitter, node: fx.Node) -> Value:
    """The same elements in another shape."""
    x = e.value(node.args[0])
    return Value(x.name, e.shape(node), x.dtype)


def _moved(e: Emitter, node: fx.Node, problem: Record, inputs: Sequence[Value], shape: Shape, name: str = "") -> Value:
    operands = {f"x{i}": value for i, value in enumerate(inputs)}
    out = Value(name or node.name, shape, inputs[0].dtype)
    return e.call(Kernel("movement", problem), operands, {"y": out})[0]


def permute(e: Emitter, node: fx.Node) -> Value:
    x, rank = e.value(node.args[0]), e.two[node.name].dim()
    if len(x.shape) != rank:
        raise e.refusal("it permutes a tensor whose rows are not samples")
    order = [d % rank for d in _order(node, rank)]
    problem = record("movement.permute", shape=x.shape, order=order, dtype=x.dtype)
    return _moved(e, node, problem, [x], tuple(x.shape[d] for d in order))


def _order(node: fx.Node, rank: int) -> list[int]:
    if is_permute(node):
        return [int(d) for d in arguments(node)[1]]
    a, b = (0, 1) if node.target is aten.t.default else arguments(node)[1:3]
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def einsum(e: Emitter, node: fx.Node) -> Value:
    """A single operand whose indices are all kept is permuted; nothing else is an einsum here."""
    equation, operands = str(node.args[0]).replace(" ", ""), arguments(node)[1]
    source, _, target = equation.partition("->")
    if len(operands) != 1 or sorted(source) != sorted(target) or len({*source}) != len(source):
        raise e.refusal(f"einsum '{equation}' is no permutation")
    x = e.value(operands[0])
    order = [source.index(c) for c in target]
    problem = record("movement.permute", shape=x.shape, order=order, dtype=x.dtype)
    return _moved(e, node, problem, [x], tuple(x.shape[d] for d in order))


def concatenate(e: Emitter, node: fx.Node) -> Value:
    nodes = list(arguments(node)[0])
    dim = int(arguments(node)[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))  # type: ignore[arg-type]
    axis = e.axis(nodes[0], dim)
    values = [e.value(n) for n in nodes]
    if len({v.dtype for v in values}) > 1 or len({v.batched for v in values}) > 1:
        raise e.refusal("it joins tensors of several types, or with and without a batch")
    problem = record("movement.concat", shapes=[v.shape for v in values], dim=axis, dtype=values[0].dtype)
    return _moved(e, node, problem, values, e.shape(node))


def _sliced(
    e: Emitter, node: fx.Node, source: Any, axis: int, start: int, stop: int, step: int, name: str = ""
) -> Value:
    x = e.value(source)
    if x.shape[axis] == BATCH:
        raise e.refusal("it takes a part of the batch")
    extent = int(x.shape[axis])
    span = range(*slice(start, stop, step).indices(extent))
    shape = (*x.shape[:axis], len(span), *x.shape[axis + 1 :])
    if len(span) == extent:
        return Value(x.name, x.shape, x.dtype)
    starts = [span.start if d == axis else 0 for d in range(len(x.shape))]
    stops = [span.stop if d == axis else 0 if size == BATCH else int(size) for d, size in enumerate(x.shape)]
    steps = [span.step if d == axis else 1 for d in range(len(x.shape))]
    problem = record("movement.slice_", shape=x.shape, starts=starts, stops=stops, steps=steps, dtype=x.dtype)
    return _moved(e, node, problem, [x], shape, name)


def slice_(e: Emitter, node: fx.Node) -> Value:
    x, dim, start, stop, step = filled(node, None, 0, None, None, 1)
    if e.two[x.name].shape[dim] != e.three[x.name].shape[dim] and not start and step == 1:
        return alias(e, node)  # the whole batch
    return _sliced(e, node, x, e.axis(x, dim), start or 0, 1 << 62 if stop is None else stop, step)


def select(e: Emitter, node: fx.Node) -> Value:
    x, dim, index = arguments(node)
    axis = e.axis(x, dim)
    start = index % int(e.shape(x)[axis])
    part = _sliced(e, node, x, axis, start, start + 1, 1)
    return Value(part.name, e.shape(node), part.dtype)


def parts(e: Emitter, node: fx.Node) -> list[Value]:
    """chunk, split and unbind: each part that is read becomes a slice."""
    x, single = operand(node, 0), node.target is aten.unbind.int
    dim = int(filled(node, None, 0)[1] if single else filled(node, None, None, 0)[2])
    axis, used = e.axis(x, dim), {arguments(u)[1]: u for u in node.users if u.target is operator.getitem}
    found, start = [], 0
    for i, (two, three) in enumerate(zip(e.two[node.name], e.three[node.name], strict=True)):
        size = 1 if single else int(two.shape[dim])
        shape = e.shape_of(two, three)
        if i in used:
            part = _sliced(e, node, x, axis, start, start + size, 1, used[i].name)
            found.append(Value(part.name, shape, part.dtype))
        else:
            found.append(Value("", shape, "float32"))
        start += size
    return found


def item(e: Emitter, node: fx.Node) -> Value:
    return e.parts[operand(node, 0)][arguments(node)[1]]


def expand(e: Emitter, node: fx.Node) -> Value:
    x, shape = e.value(node.args[0]), e.shape(node)
    if elements(x.shape) == elements(shape):
        return alias(e, node)
    problem = record("movement.expand", shape=e.broadcast(x, shape), target=shape, dtype=x.dtype)
    return _moved(e, node, problem, [x], shape)


def pad(e: Emitter, node: fx.Node) -> Value:
    x, pads, *rest = arguments(node)
    value = e.value(x)
    mode = next((r for r in rest if isinstance(r, str)), node.kwargs.get("mode", "constant"))
    fill: Any = next((r for r in rest if isinstance(r, int | float)), node.kwargs.get("value")) or 0.0
    rank = len(value.shape)
    before, after = [0] * rank, [0] * rank
    for i, (low, high) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        before[rank - 1 - i], after[rank - 1 - i] = low, high
    if mode != "constant" or min(before + after) < 0 or (value.batched and before[0] + after[0]):
        raise e.refusal("only padding by a constant, of other dimensions than the batch, has a kernel")
    problem = record("movement.pad", shape=value.shape, before=before, after=after, fill=float(fill), dtype=value.dtype)
    return _moved(e, node, problem, [value], e.shape(node))


def upsample(e: Emitter, node: fx.Node) -> Value:
    x, factors = e.value(node.args[0]), arguments(node)[1]
    problem = record("movement.upsample", shape=x.shape, factors=factors, dtype=x.dtype)
    return _moved(e, node, problem, [x], e.shape(node))


def embedding(e: Emitter, node: fx.Node) -> Value:
    table, index = e.value(node.args[0]), e.value(node.args[1])
    if table.batched or not index.batched:
        raise e.refusal("its table must be a stored tensor and its indices an input")
    rows, width = table.inner
    problem = record(
        "movement.Gather", rows=rows, width=width, positions=index.inner, dtype=table.dtype, index_dtype=index.dtype
    )
    out = Value(node.name, e.shape(node), table.dtype)
    return e.call(Kernel("movement", problem), {"index": index, "table": table}, {"y": out})[0]
