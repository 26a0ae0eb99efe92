"""Emits operators on floats: pointwise, norms, attention, float layers, and data movement."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from mpq_compiler.backends.onnx.emitter import Emitter, Emitters, Made, Shape, Value
from mpq_compiler.backends.onnx.graph import ELEMENT
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import MOVEMENT, aten

Arguments = dict[str, Any]
EMITTERS = Emitters()

_UNARY: dict[Any, str] = {
    aten.sigmoid.default: "Sigmoid",
    aten.tanh.default: "Tanh",
    aten.relu.default: "Relu",
    aten.exp.default: "Exp",
    aten.log.default: "Log",
    aten.sin.default: "Sin",
    aten.cos.default: "Cos",
    aten.sqrt.default: "Sqrt",
    aten.reciprocal.default: "Reciprocal",
    aten.neg.default: "Neg",
    aten.abs.default: "Abs",
    aten.erf.default: "Erf",
    aten.floor.default: "Floor",
    aten.ceil.default: "Ceil",
    aten.round.default: "Round",
    aten.logical_not.default: "Not",
    aten.bitwise_not.default: "Not",
}
_BINARY: dict[Any, str] = {
    aten.add.Tensor: "Add",
    aten.add.Scalar: "Add",
    aten.sub.Tensor: "Sub",
    aten.sub.Scalar: "Sub",
    aten.mul.Tensor: "Mul",
    aten.mul.Scalar: "Mul",
    aten.div.Tensor: "Div",
    aten.div.Scalar: "Div",
    aten.pow.Tensor_Scalar: "Pow",
    aten.pow.Tensor_Tensor: "Pow",
    aten.maximum.default: "Max",
    aten.minimum.default: "Min",
    aten.logical_and.default: "And",
    aten.logical_or.default: "Or",
}
_COMPARISONS: dict[Any, str] = {
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), "Equal"),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), "Greater"),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), "GreaterOrEqual"),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), "Less"),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), "LessOrEqual"),
}
_REDUCTIONS: dict[Any, str] = {
    aten.mean.dim: "ReduceMean",
    aten.sum.dim_IntList: "ReduceSum",
    aten.amax.default: "ReduceMax",
    aten.amin.default: "ReduceMin",
}


# --- pointwise ------------------------------------------------------------------------------------------------


@EMITTERS.emits(*_UNARY)
def _unary(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    return e.pointwise(node, [a["self"]], lambda x: e.graph.op(_UNARY[node.target], x, name=node.name))


@EMITTERS.emits(aten.silu.default)
def _silu(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g = e.graph
    return e.pointwise(node, [a["self"]], lambda x: g.op("Mul", x, g.op("Sigmoid", x), name=node.name))


@EMITTERS.emits(aten.gelu.default)
def _gelu(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    return e.pointwise(
        node, [a["self"]], lambda x: e.graph.op("Gelu", x, approximate=a["approximate"], name=node.name)
    )


@EMITTERS.emits(aten.rsqrt.default)
def _rsqrt(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g = e.graph
    return e.pointwise(node, [a["self"]], lambda x: g.op("Reciprocal", g.op("Sqrt", x), name=node.name))


@EMITTERS.emits(aten.square.default)
def _square(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    return e.pointwise(node, [a["self"]], lambda x: e.graph.op("Mul", x, x, name=node.name))


@EMITTERS.emits(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    bounds = [a.get(k) for k in ("min", "max")]
    limits = ["" if b is None else e.number(b, e.dtype(node)) for b in bounds]
    return e.pointwise(node, [a["self"]], lambda x: e.graph.op("Clip", x, *limits, name=node.name))


@EMITTERS.emits(aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default)
def _convert(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    if e.dtype(node) not in ELEMENT:
        raise e.refusal(node, f"it makes {e.dtype(node)}")
    return e.pointwise(node, [a["self"]], lambda x: x)


@EMITTERS.emits(*_BINARY)
def _binary(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    left, right = list(a.values())[:2]
    kind, alpha = _BINARY[node.target], a.get("alpha", 1)

    def write(x: str, y: str) -> str:
        if alpha != 1:
            y = e.graph.op("Mul", y, e.number(alpha, e.dtype(node)))
        return e.graph.op(kind, x, y, name=node.name)

    if a.get("rounding_mode") is not None:
        raise e.refusal(node, "it rounds a quotient")
    return e.pointwise(node, [left, right], write)


@EMITTERS.emits(aten.rsub.Scalar, aten.rsub.Tensor)
def _reverse_subtract(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    if a["alpha"] != 1:
        raise e.refusal(node, f"it multiplies by {a['alpha']} before it subtracts")
    return e.pointwise(node, [a["other"], a["self"]], lambda x, y: e.graph.op("Sub", x, y, name=node.name))


@EMITTERS.emits(*_COMPARISONS)
def _compare(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    dtypes = [e.example(o) if isinstance(o, fx.Node) else o for o in (a["self"], a["other"])]
    common = str(torch.result_type(*dtypes)).removeprefix("torch.")
    kind = _COMPARISONS[node.target]
    write = lambda x, y: e.graph.op(kind, x, y, name=node.name)  # noqa: E731
    return e.pointwise(node, [a["self"], a["other"]], write, common)


@EMITTERS.emits(aten.where.self)
def _where(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    condition, dtype = e.last(a["condition"]), e.dtype(node)
    chosen = (e.cast(e.last(o), e.dtype(o), dtype) for o in (a["self"], a["other"]))
    return e.graph.op("Where", condition, *chosen, name=node.name)


# --- reductions and norms -------------------------------------------------------------------------------------


@EMITTERS.emits(*_REDUCTIONS)
def _reduce(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    x = e.cast(e.last(a["self"]), e.dtype(a["self"]), e.dtype(node))
    axes = e.graph.ints(*(a["dim"] or range(e.rank(a["self"]))))
    return e.graph.op(_REDUCTIONS[node.target], x, axes, keepdims=int(a["keepdim"]), name=node.name)


@EMITTERS.emits(aten.softmax.int, aten._softmax.default)
def _softmax(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    x = e.cast(e.last(a["self"]), e.dtype(a["self"]), e.dtype(node))
    return e.graph.op("Softmax", x, axis=a["dim"], name=node.name)


@EMITTERS.emits(ops.group_norm)
def _group_norm(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    batch, *inner, channels = e.shape(node)
    y = _normalized_groups(e, node, a, e.first(a["x"]), a["groups"], (batch, channels, *inner))
    return Value(y, first=len(inner) > 0)


@EMITTERS.emits(aten.group_norm.default)
def _group_norm_of_images(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    return _normalized_groups(e, node, a, e.last(a["input"]), a["num_groups"], e.shape(node))


def _normalized_groups(e: Emitter, node: fx.Node, a: Arguments, x: str, groups: int, shape: Shape) -> str:
    """Emits a group norm of x [B, C, ...] as InstanceNormalization, which runs twice as fast as GroupNormalization."""
    g = e.graph
    ones, zeros = (g.constant(np.full(groups, v), "float32", f"{v}x{groups}") for v in (1, 0))
    rows = g.op("Reshape", x, g.ints(0, groups, -1))
    parts = [(kind, part) for kind, part in (("Mul", a["weight"]), ("Add", a["bias"])) if part is not None]
    normalized = g.op("InstanceNormalization", rows, ones, zeros, epsilon=a["eps"])
    y = e.reshaped(normalized, shape, None if parts else node.name)
    for kind, part in parts:
        channels = e.reshaped(e.last(part), (shape[1], *[1] * (len(shape) - 2)))
        y = g.op(kind, y, channels, name=node.name if part is parts[-1][1] else None)
    return y


@EMITTERS.emits(aten.layer_norm.default)
def _layer_norm(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g, shape = e.graph, a["normalized_shape"]
    scale = g.constant(np.ones(shape), "float32", f"ones{list(shape)}") if a["weight"] is None else e.last(a["weight"])
    bias = [] if a["bias"] is None else [e.last(a["bias"])]
    x = e.last(a["input"])
    return g.op("LayerNormalization", x, scale, *bias, axis=-len(shape), epsilon=a["eps"], name=node.name)


@EMITTERS.emits(ops.rms_norm)
def _rms_norm(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    """Emits an RMS norm in the form that onnxruntime fuses to SimplifiedLayerNormalization."""
    g, x = e.graph, e.last(a["x"])
    square = g.op("ReduceMean", g.op("Pow", x, e.number(2.0)), g.ints(-1), keepdims=1)
    y = g.op("Div", x, g.op("Sqrt", g.op("Add", square, e.number(a["eps"]))))
    return y if a["weight"] is None else g.op("Mul", y, e.last(a["weight"]), name=node.name)


@EMITTERS.emits(ops.hadamard)
def _hadamard(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g, x, block, shape = e.graph, e.last(a["x"]), a["block"], e.shape(node)
    matrix = g.constant(ops.hadamard(torch.eye(block), block).numpy(), "float32", f"hadamard[{block}]")
    if shape[-1] == block:
        return g.op("MatMul", x, matrix, name=node.name)
    blocks = e.reshaped(x, (*shape[:-1], shape[-1] // block, block))
    return e.reshaped(g.op("MatMul", blocks, matrix), shape, node.name)


# --- contractions ---------------------------------------------------------------------------------------------


def _in_float(e: Emitter, node: fx.Node) -> None:
    e.program.fallbacks.setdefault(node.name, "computed in float32: the plan leaves it unquantized")


@EMITTERS.emits(aten.linear.default)
def _linear(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g = e.graph
    _in_float(e, node)
    order = [*range(e.rank(a["weight"]) - 2), -1, -2]
    weight = g.op("Transpose", e.last(a["weight"]), perm=[d % e.rank(a["weight"]) for d in order])
    y = g.op("MatMul", e.last(a["input"]), weight, name=node.name if a["bias"] is None else None)
    return y if a["bias"] is None else g.op("Add", y, e.last(a["bias"]), name=node.name)


@EMITTERS.emits(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    left, right = list(a.values())[:2]
    return e.graph.op("MatMul", e.last(left), e.last(right), name=node.name)


@EMITTERS.emits(ops.conv2d)
def _conv2d(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    _in_float(e, node)
    top, bottom, left, right = a["padding"]
    weight = e.graph.op("Transpose", e.last(a["weight"]), perm=[0, 3, 1, 2])
    bias = [] if a["bias"] is None else [e.last(a["bias"])]
    y = e.graph.op(
        "Conv", e.first(a["x"]), weight, *bias, name=node.name,
        strides=list(a["stride"]), pads=[top, left, bottom, right], group=a["groups"],
    )  # fmt: skip
    return Value(y, first=True)


@EMITTERS.emits(aten.conv2d.default)
def _conv2d_of_images(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    bias = [] if a["bias"] is None else [e.last(a["bias"])]
    pads, strides, dilations = (_pair(a[k]) for k in ("padding", "stride", "dilation"))
    return e.graph.op(
        "Conv", e.last(a["input"]), e.last(a["weight"]), *bias, name=node.name,
        strides=strides, pads=[*pads, *pads], dilations=dilations, group=a["groups"],
    )  # fmt: skip


def _pair(values: Sequence[int]) -> list[int]:
    return [int(v) for v in values] * (2 // len(values))


@EMITTERS.emits(aten.einsum.default)
def _einsum(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    return e.graph.op("Einsum", *map(e.last, a["tensors"]), equation=a["equation"].replace(" ", ""), name=node.name)


@EMITTERS.emits(ops.attention)
def _attention(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    heads = a["heads"]
    width = e.shape(a["q"])[-1] // heads
    scale = width**-0.5 if a["scale"] is None else a["scale"]
    q, k, v = (split_heads(e, e.last(a[x]), e.shape(a[x])[-1], heads, x == "k") for x in "qkv")
    y = attend(e, e.graph.op("Mul", q, e.number(scale)), k, v, a["mask"])
    return join_heads(e, node, y)


def split_heads(e: Emitter, x: str, channels: int, heads: int, transposed: bool = False) -> str:
    """Reshapes [B, T, H*D] to [B, H, T, D], or ``transposed`` to [B, H, D, T]."""
    rows = e.graph.op("Reshape", x, e.graph.ints(0, 0, heads, channels // heads))
    return e.graph.op("Transpose", rows, perm=[0, 2, 3, 1] if transposed else [0, 2, 1, 3])


def join_heads(e: Emitter, node: fx.Node, y: str) -> str:
    """Reshapes [B, H, T, D] to the node's [B, T, H*D]."""
    tokens = e.graph.op("Transpose", y, perm=[0, 2, 1, 3])
    return e.graph.op("Reshape", tokens, e.graph.ints(0, 0, e.shape(node)[-1]), name=node.name)


def attend(e: Emitter, q: str, k: str, v: str, mask: fx.Node | None) -> str:
    """Emits softmax(q k + mask) v for q [B, H, Tq, D], k [B, H, D, Tk], v [B, H, Tk, D]."""
    logits = e.graph.op("MatMul", q, k)
    if mask is not None:
        logits = e.graph.op("Add", logits, e.last(mask))
    return e.graph.op("MatMul", e.graph.op("Softmax", logits, axis=-1), v)


@EMITTERS.emits(aten.scaled_dot_product_attention.default)
def _attention_of_heads(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g, rank = e.graph, e.rank(a["query"])
    if a["is_causal"]:
        raise e.refusal(node, "it is causal")
    if a["attn_mask"] is not None and e.dtype(a["attn_mask"]) == "bool":
        raise e.refusal(node, "its mask is boolean")
    scale = e.shape(a["query"])[-1] ** -0.5 if a["scale"] is None else a["scale"]
    order = [*range(rank - 2), rank - 1, rank - 2]
    q, k = g.op("Mul", e.last(a["query"]), e.number(scale)), g.op("Transpose", e.last(a["key"]), perm=order)
    return attend(e, q, k, e.last(a["value"]), a["attn_mask"])


# --- movement -------------------------------------------------------------------------------------------------


@EMITTERS.emits(*MOVEMENT)
def _reshape(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    """Emits a reshape, or nothing where the shape stays."""
    source, x = e.shape(a["self"]), e.value(a["self"])
    shape = e.shape(node)
    if source == shape:
        return x
    if x.first and len(shape) > 2 and (source[0], source[-1]) == (shape[0], shape[-1]):
        return Value(e.reshaped(x.name, (shape[0], shape[-1], *shape[1:-1]), node.name), True)
    return e.reshaped(e.last(a["self"]), shape, node.name)


@EMITTERS.emits(aten.permute.default, aten.transpose.int, aten.swapaxes.default, aten.t.default)
def _permute(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    """Emits a permute, or nothing where the value already has the result's order or its channels-first form."""
    x, rank = e.value(a["self"]), e.rank(node)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [d % rank for d in a["dims"]]
    elif rank > 1:
        one, other = [d % rank for d in list(a.values())[1:3]] or [0, 1]
        order[one], order[other] = order[other], order[one]
    lies = [0, rank - 1, *range(1, rank - 1)] if x.first else list(range(rank))
    wanted = [lies.index(d) for d in order]
    if wanted == sorted(wanted):
        return Value(x.name)
    if rank > 2 and [wanted[0], wanted[-1], *wanted[1:-1]] == sorted(wanted):
        return Value(x.name, True)
    return e.graph.op("Transpose", x.name, perm=wanted, name=node.name)


def _lying(e: Emitter, source: fx.Node, dim: int) -> tuple[Value, int]:
    """The value of a node, and its axis that is dimension ``dim`` of the program's tensor."""
    value, dim, rank = e.value(source), e.axis(source, dim), e.rank(source)
    if value.first and dim:
        dim = 1 if dim == rank - 1 else dim + 1
    return value, dim


@EMITTERS.emits(aten.cat.default, aten.concat.default)
def _concatenate(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    sources = [s for s in a["tensors"] if e.example(s).numel()]
    if all(e.value(s).first for s in sources):
        pairs = [_lying(e, s, a["dim"]) for s in sources]
        return Value(e.graph.op("Concat", *(v.name for v, _ in pairs), axis=pairs[0][1], name=node.name), True)
    values = (e.cast(e.last(s), e.dtype(s), e.dtype(node)) for s in sources)
    return e.graph.op("Concat", *values, axis=e.axis(node, a["dim"]), name=node.name)


@EMITTERS.emits(aten.stack.default)
def _stack(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    axis = e.axis(node, a["dim"])
    parts = (e.graph.op("Unsqueeze", e.last(s), e.graph.ints(axis)) for s in a["tensors"])
    return e.graph.op("Concat", *parts, axis=axis, name=node.name)


@EMITTERS.emits(aten.slice.Tensor)
def _slice(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g, dim = e.graph, e.axis(a["self"], a["dim"])
    if e.shape(node) == e.shape(a["self"]) and a["step"] == 1:
        return e.value(a["self"])
    if e.shape(a["self"])[dim] < 0:
        raise e.refusal(node, "it takes a part of the batch")
    (value, axis), size = _lying(e, a["self"], dim), e.shape(a["self"])[dim]
    span = range(*slice(a["start"], a["end"], a["step"]).indices(size))
    bounds = (g.ints(span.start), g.ints(span.stop), g.ints(axis), g.ints(span.step))
    return Value(g.op("Slice", value.name, *bounds, name=node.name), value.first)


@EMITTERS.emits(aten.select.int)
def _select(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    axis = e.axis(a["self"], a["dim"])
    if e.shape(a["self"])[axis] < 0:
        raise e.refusal(node, "it takes a part of the batch")
    index = e.graph.constant(a["index"] % e.shape(a["self"])[axis], "int64")
    return e.graph.op("Gather", e.last(a["self"]), index, axis=axis, name=node.name)


@EMITTERS.emits(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
def _split(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    dim = e.axis(a["self"], a["dim"])
    sizes = [shape[dim] for shape in e.shapes(node)]
    if min(sizes) < 0:
        raise e.refusal(node, "it takes a part of the batch")
    value, axis = _lying(e, a["self"], dim)
    parts = e.graph.ops("Split", len(sizes), value.name, e.graph.ints(*sizes), axis=axis, name=node.name)
    return [Value(part, value.first) for part in parts]


@EMITTERS.emits(aten.unbind.int)
def _unbind(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    axis = e.axis(a["self"], a["dim"])
    if e.shape(a["self"])[axis] < 0:
        raise e.refusal(node, "it takes a part of the batch")
    x = e.last(a["self"])
    return [Value(e.graph.op("Gather", x, e.graph.constant(i, "int64"), axis=axis)) for i in range(len(e.shapes(node)))]


@EMITTERS.emits(operator.getitem)
def _item(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    source, index = node.args
    assert isinstance(source, fx.Node) and isinstance(index, int)
    return e.item(source, index)


@EMITTERS.emits(aten.expand.default, aten.broadcast_to.default)
def _expand(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    shape, own = e.shape(node), e.shape(a["self"])
    if shape == own:
        return e.value(a["self"])
    own = (*[1] * (len(shape) - len(own)), *own)
    target = tuple(1 if have == d else d for have, d in zip(own, shape, strict=True))
    return e.graph.op("Expand", e.last(a["self"]), e.sizes(target), name=node.name)


@EMITTERS.emits(aten.repeat.default)
def _repeat(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    x, shape = e.last(a["self"]), e.shape(node)
    own = (*[1] * (len(shape) - e.rank(a["self"])), *e.shape(a["self"]))
    times = tuple(d if have == 1 else d // have for have, d in zip(own, shape, strict=True))
    return e.graph.op("Tile", e.reshaped(x, own), e.sizes(times), name=node.name)


@EMITTERS.emits(aten.pad.default, aten.constant_pad_nd.default)
def _pad(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    rank, amounts = e.rank(node), list(a["pad"])
    before, after = [0] * rank, [0] * rank
    for i, (low, high) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        before[rank - 1 - i], after[rank - 1 - i] = int(low), int(high)
    if a.get("mode", "constant") != "constant" or before[0] or after[0]:
        raise e.refusal(node, "only padding by a constant, of other dimensions than the batch, is known")
    fill = e.number(a["value"] or 0, e.dtype(node))
    return e.graph.op("Pad", e.last(a["self"]), e.graph.ints(*before, *after), fill, name=node.name)


@EMITTERS.emits(ops.for_each_sample)
def _for_each_sample(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    return e.graph.op("Expand", e.last(a["x"]), e.sizes((-1, *e.shape(node)[1:])), name=node.name)


@EMITTERS.emits(ops.prepend)
def _prepend(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    token = e.graph.op("Expand", e.last(a["token"]), e.sizes((-1, 1, e.shape(node)[-1])))
    return e.graph.op("Concat", token, e.last(a["x"]), axis=1, name=node.name)


@EMITTERS.emits(ops.row_of_token)
def _row_of_token(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g, keys = e.graph, e.last(a["tokens"])
    if a["token"] is not None:
        keys = g.op("Cast", g.op("Equal", keys, g.constant(a["token"], "int64")), to=ELEMENT["int32"])
    place = g.op("ArgMax", keys, axis=1, keepdims=1)  # [B, 1], of equal ones the first
    return g.op("GatherND", e.last(a["x"]), place, batch_dims=1, name=node.name)


@EMITTERS.emits(aten.embedding.default)
def _embedding(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    return e.graph.op("Gather", e.last(a["weight"]), e.last(a["indices"]), axis=0, name=node.name)


@EMITTERS.emits(aten.index_select.default)
def _index_select(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    return e.graph.op("Gather", e.last(a["self"]), e.last(a["index"]), axis=e.axis(node, a["dim"]), name=node.name)


@EMITTERS.emits(ops.upsample_nearest2d)
def _upsample(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g, x = e.graph, e.value(a["x"])
    (high, wide), (_, height, width, channels) = a["factors"], e.shape(a["x"])
    if x.first:
        return Value(_resized(e, node, x.name, (high, wide)), True)
    spread = g.op("Reshape", x.name, g.ints(0, height, 1, width, 1, channels))
    return e.reshaped(g.op("Expand", spread, g.ints(1, 1, high, 1, wide, 1)), e.shape(node), node.name)


@EMITTERS.emits(aten.upsample_nearest2d.vec)
def _upsample_of_images(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    *_, height, width = e.shape(a["input"])
    *_, high, wide = e.shape(node)
    return _resized(e, node, e.last(a["input"]), (high / height, wide / width))


def _resized(e: Emitter, node: fx.Node, x: str, factors: tuple[float, float]) -> str:
    """Emits nearest-neighbour resizing of x [B, C, H, W]."""
    scales = e.graph.constant((1, 1, *factors), "float32")
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return e.graph.op("Resize", x, "", scales, mode="nearest", **how, name=node.name)
