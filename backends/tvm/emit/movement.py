"""Emits calls that move data: as copies, or as no call at all where only the shape changes."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from mpq_compiler.backends.tvm.emit import pointwise
from mpq_compiler.backends.tvm.emit.emitter import Emitter, Formula, elements, filled
from mpq_compiler.backends.tvm.plan.calls import BATCH, Kernel, Record, Shape, Value, record
from mpq_compiler.backends.tvm.plan.views import View, whole
from mpq_compiler.ir.aten import aten, is_permute
from mpq_compiler.ir.graph import arguments, operand


def alias(e: Emitter, node: fx.Node) -> Value:
    """Emits a reshape: no call, the same elements in another shape."""
    x = e.value(node.args[0])
    return Value(x.name, e.shape(node), x.dtype)


def _moved(e: Emitter, node: fx.Node, problem: Record, inputs: Sequence[Value], shape: Shape) -> Value:
    operands = {f"x{i}": value for i, value in enumerate(inputs)}
    out = Value(node.name, shape, inputs[0].dtype)
    return e.call(Kernel("movement", problem), operands, {"y": out})[0]


def permute(e: Emitter, node: fx.Node) -> Value:
    """Emits a permute or transpose as a copy, which readers of strides may bypass."""
    rank = e.two[node.name].dim()
    return _permuted(e, node, node.args[0], [d % rank for d in _order(node, rank)])


def _permuted(e: Emitter, node: fx.Node, source: Any, order: Sequence[int]) -> Value:
    x = e.value(source)
    if x.batched and len(x.shape) == len(order) + 1 and order[0] == 0:  # several rows of each sample
        order = [0, 1, *(d + 1 for d in order[1:])]
    if len(x.shape) != len(order) or (x.batched and order[0] != 0):
        raise e.refusal("it permutes a tensor whose rows are not samples, or moves the batch")
    view = e.view(x)
    moved = View(view.source, tuple(view.shape[d] for d in order), tuple(view.strides[d] for d in order), view.offset)
    return e.copied(moved, node.name)


def _order(node: fx.Node, rank: int) -> list[int]:
    if is_permute(node):
        return [int(d) for d in arguments(node)[1]]
    a, b = (0, 1) if node.target is aten.t.default else arguments(node)[1:3]
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def rearranged(e: Emitter, node: fx.Node) -> Value:
    """Emits an einsum of one operand that keeps all indices: a permute."""
    source, _, target = str(node.args[0]).replace(" ", "").partition("->")
    if sorted(source) != sorted(target) or len({*source}) != len(source):
        raise e.refusal(f"einsum '{node.args[0]}' is no permutation")
    return _permuted(e, node, arguments(node)[1][0], [source.index(c) for c in target])


def concatenate(e: Emitter, node: fx.Node) -> Value:
    """Emits a concatenation, or the rotation of pairs that it is a part of."""
    nodes = [n for n in arguments(node)[0] if e.two[n.name].numel()]
    dim = int(arguments(node)[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))  # type: ignore[arg-type]
    values, axis = [e.value(n) for n in nodes], e.axis(nodes[0], dim)
    return _rotated(e, node, values, axis) or _joined(e, node, [e.view(v) for v in values], axis)


def _rotated(e: Emitter, node: fx.Node, parts: Sequence[Value], axis: int) -> Value | None:
    """Emits ``stack([-x[..., 1::2], x[..., 0::2]], -1)``, the pairs of rotary embeddings, as one operation on x.

    None where the concatenation is something else.
    """
    formula = e.formulas.get(parts[0].name)
    if len(parts) != 2 or formula is None or [step.get("op") for step in formula.steps] != ["neg"]:
        return None
    odd, even = e.view(formula.inputs[0]), e.view(parts[1]).reshaped(formula.shape)
    shape = e.shape(node)
    if even is None or axis != len(shape) - 1 or shape != (*formula.shape, 2):
        return None
    pairs = View(even.source, shape, (*even.strides, 1), even.offset)
    if odd != View(even.source, even.shape, even.strides, even.offset + 1) or not pairs.is_whole:
        return None
    turned = Formula((*shape[:-2], 2 * int(shape[-2])))
    turned.step("rotate", turned.read(Value(even.source.name, turned.shape, even.source.dtype)))
    made = pointwise.run(e, turned, {}, node.name)
    return Value(made.name, shape, made.dtype)


def for_each_sample(e: Emitter, node: fx.Node) -> Value:
    """Emits a row for every sample as a copy, which readers of strides may bypass."""
    x = e.view(e.value(node.args[0]))
    if e.folds(node):
        raise e.refusal("a sample has several rows, each a copy")
    return e.copied(View(x.source, (BATCH, *x.shape[1:]), (0, *x.strides[1:]), x.offset), node.name)


def prepend(e: Emitter, node: fx.Node) -> Value:
    """Emits a stored token before the tokens of every sample."""
    x, token = (e.value(n) for n in arguments(node))
    if e.folds(node):
        raise e.refusal("a sample has several rows, each with a token of its own")
    first = View(token, (BATCH, 1, token.size), (0, 0, 1))
    return _joined(e, node, [first, e.view(x)], 1)


def _joined(e: Emitter, node: fx.Node, parts: Sequence[View], axis: int) -> Value:
    if len({(v.source.dtype, v.shape[:1] == (BATCH,)) for v in parts}) > 1:
        raise e.refusal("it joins tensors of several types, or with and without a batch")
    shape = e.shape(node)
    strides, copies, offset = whole(Value("", shape, "")).strides, [], 0
    sources = list({v.source.name: v.source for v in parts}.values())
    for view in parts:
        copies.append(
            record(
                "movement.Copy", source=[s.name for s in sources].index(view.source.name), extents=view.extents,
                source_strides=view.strides, source_offset=view.offset, target_strides=strides,
                target_offset=offset * math.prod(int(d) for d in shape[axis + 1 :]),
            )
        )  # fmt: skip
        offset += view.extents[axis]
    if len(sources) == 1 and all(_stays(copy) for copy in copies) and elements(sources[0].shape) == elements(shape):
        return Value(sources[0].name, shape, sources[0].dtype)  # slices of one tensor, put together again
    problem = record(
        "movement.Movement", inputs=[s.shape for s in sources], shape=shape, copies=copies, dtype=sources[0].dtype
    )
    return _moved(e, node, problem, sources, shape)


def _stays(copy: Record) -> bool:
    """Whether a copy leaves the elements in their places."""
    fields = dict(copy.fields)
    return (fields["source_offset"], fields["source_strides"]) == (fields["target_offset"], fields["target_strides"])


def _sliced(e: Emitter, source: Any, axis: int, start: int, stop: int, step: int, name: str) -> Value:
    x = e.value(source)
    if x.shape[axis] == BATCH:
        raise e.refusal("it takes a part of the batch")
    span = range(*slice(start, stop, step).indices(int(x.shape[axis])))
    if len(span) == x.shape[axis]:
        return x
    view = e.view(x)
    stride = view.strides[axis]
    shape = (*x.shape[:axis], len(span), *x.shape[axis + 1 :])
    strides = (*view.strides[:axis], stride * span.step, *view.strides[axis + 1 :])
    return e.copied(View(view.source, shape, strides, view.offset + span.start * stride), name)


def slice_(e: Emitter, node: fx.Node) -> Value:
    """Emits a slice along a dimension other than the batch."""
    x, dim, start, stop, step = filled(node, None, 0, None, None, 1)
    if all(sizes[x.name].shape == sizes[node.name].shape for sizes in (e.two, e.three)):
        return alias(e, node)  # all of it, as of a batch
    return _sliced(e, x, e.axis(x, dim), start or 0, 1 << 62 if stop is None else stop, step, node.name)


def select(e: Emitter, node: fx.Node) -> Value:
    """Emits the selection of one index along a dimension other than the batch."""
    x, dim, index = arguments(node)
    axis = e.axis(x, dim)
    if e.shape(x)[axis] == BATCH:
        raise e.refusal("it takes a part of the batch")
    start = index % int(e.shape(x)[axis])
    part = _sliced(e, x, axis, start, start + 1, 1, node.name)
    return Value(part.name, e.shape(node), part.dtype)


def parts(e: Emitter, node: fx.Node) -> list[Value]:
    """Emits chunk, split or unbind: each part that is read becomes a slice."""
    x, single = operand(node, 0), node.target is aten.unbind.int
    dim = int(filled(node, None, 0)[1] if single else filled(node, None, None, 0)[2])
    axis, used = e.axis(x, dim), {arguments(u)[1]: u for u in node.users if u.target is operator.getitem}
    found, start = [], 0
    for i, (two, three) in enumerate(zip(e.two[node.name], e.three[node.name], strict=True)):
        size = 1 if single else int(two.shape[dim])
        shape = e.shape_of(two, three)
        if i in used:
            part = _sliced(e, x, axis, start, start + size, 1, used[i].name)
            found.append(Value(part.name, shape, part.dtype))
        else:
            found.append(Value("", shape, "float32"))
        start += size
    return found


def item(e: Emitter, node: fx.Node) -> Value:
    """The value of one of several results; no call is emitted."""
    number: int = arguments(node)[1]
    return e.parts[operand(node, 0)][number]


def expand(e: Emitter, node: fx.Node) -> Value:
    """Emits a broadcast as a copy, which readers of strides may bypass."""
    x, shape = e.value(node.args[0]), e.shape(node)
    if elements(x.shape) == elements(shape):
        return alias(e, node)
    view = e.view(Value(x.name, e.broadcast(x, shape), x.dtype))
    padding = (0,) * (len(shape) - len(view.strides))
    return e.copied(View(view.source, shape, padding + view.strides, view.offset), node.name)


def pad(e: Emitter, node: fx.Node) -> Value:
    """Emits a padding by a constant."""
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
    """Emits nearest-neighbour upsampling of images [B, H, W, C] by whole factors."""
    x, factors = e.value(node.args[0]), arguments(node)[1]
    batch, *images, height, width, channels = x.shape  # several images of a sample are one high image
    shape = (batch, math.prod(int(d) for d in images) * height, width, channels)
    problem = record("movement.upsample", shape=shape, factors=factors, dtype=x.dtype)
    return _moved(e, node, problem, [x], e.shape(node))


def row_of_token(e: Emitter, node: fx.Node) -> Value:
    """Emits the pooling of a text: the row of one of its tokens."""
    x, tokens, token = e.value(node.args[0]), e.value(node.args[1]), arguments(node)[2]
    rows, width = x.inner
    problem = record(
        "movement.TokenRow", rows=rows, width=width, token=token, dtype=x.dtype, token_dtype=tokens.dtype
    )
    out = Value(node.name, e.shape(node), x.dtype)
    return e.call(Kernel("movement", problem), {"tokens": tokens, "x": x}, {"y": out})[0]


def embedding(e: Emitter, node: fx.Node) -> Value:
    """Emits the look-up of an input's indices in a stored table, which stays as it is: few of its rows are read."""
    place, index = operand(node, 0), e.value(node.args[1])
    table = e.stored(place) if e.is_stored(place) else e.value(place)
    if table.batched or not index.batched:
        raise e.refusal("its table must be a stored tensor and its indices an input")
    rows, width = table.inner
    half = {"dtype": "float32", "stored": table.dtype} if table.dtype == "float16" else {"dtype": table.dtype}
    problem = record(
        "movement.Gather", rows=rows, width=width, positions=index.inner, index_dtype=index.dtype, **half
    )
    out = Value(node.name, e.shape(node), half["dtype"])
    return e.call(Kernel("movement", problem), {"index": index, "table": table}, {"y": out})[0]
