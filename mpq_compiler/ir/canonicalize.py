"""Canonicalizes calls that torch spells in several ways, so that passes and backends know one form of each."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.convolutions import of_frames, planar, transposed
from mpq_compiler.ir.editor import Editor, bound
from mpq_compiler.ir.graph import arguments, operand, prune

# --- spellings ----------------------------------------------------------------------------------------------


def respell(edit: Editor) -> None:
    """Canonicalizes the calls of a graph, bit for bit but for norms (an f32 rounding or two).

    Parts of a tensor become slices and selections, stacks become concatenations, and an einsum of one operand becomes a
    permute. Root mean square norms, written out or not, become `ops.rms_norm`.
    """
    for node in list(edit.graph.nodes):
        if node.op != "call_function" or node not in edit:
            continue
        with edit.before(node):
            if node.target is operator.getitem:
                _part(edit, node)
            elif node.target is aten.slice.Tensor:
                _slice(edit, node)
            elif node.target is aten.stack.default:
                _stack(edit, node)
            elif node.target is aten.einsum.default:
                _einsum(edit, node)
            elif node.target is aten.outer.default:
                column = edit.call(aten.unsqueeze.default, operand(node, 0), 1)
                edit.replace(node, edit.call(aten.mul.Tensor, column, operand(node, 1)))
            elif node.target is aten.rms_norm.default:
                _rms_norm(edit, node)
            elif node.target is aten.mul.Tensor:
                _written_out_norm(edit, node)
            elif node.target is aten.slice_scatter.default:
                _slice_scatter(edit, node)
            elif node.target is aten.select_scatter.default:
                _select_scatter(edit, node)
            elif node.target in TRUTHS and _of_truths(edit, node):
                edit.replace(node, edit.call(*TRUTHS[node.target](*node.args)))
            elif node.target is ops.for_each_sample and edit.value(node).dtype == torch.bool:
                _stored_truths(edit, node)
            elif node.target is aten.cat.default and edit.value(node).dtype == torch.bool:
                _joined_truths(edit, node)
            elif node.target is aten.leaky_relu.default:
                x, slope = bound(node, None, 0.01)
                positive = edit.call(aten.gt.Scalar, x, 0)
                edit.replace(node, edit.call(aten.where.self, positive, x, edit.call(aten.mul.Tensor, x, slope)))
            elif node.target is aten.embedding.default:
                _embedded_truths(edit, node)
            elif node.target is aten.index.Tensor:
                _index(edit, node)
            elif node.target in (aten.sum.dim_IntList, aten.mean.dim):
                _mean(edit, node)
            elif node.target in (aten.to.dtype, aten._to_copy.default):
                _double(edit, node)
            elif node.target in POOLS:
                _average_pool(edit, node)
            elif node.target in (aten.conv1d.default, aten.conv3d.default):
                planar(edit, node)
            elif node.target is aten.conv_transpose1d.default:
                transposed(edit, node)
            elif node.target is aten.group_norm.default and (edit.rank(node) > 4 or _rows(edit, node) > 1):
                _group_norm(edit, node)
            elif node.target is aten.scaled_dot_product_attention.default and _rows(edit, node) > 1:
                _attention_of_rows(edit, node)
            elif node.target is aten.reciprocal.default:
                edit.replace(node, edit.call(aten.pow.Tensor_Scalar, operand(node, 0), -1))
            elif node.target is aten.matmul.default and _is_outer(edit, node):
                edit.replace(node, edit.call(aten.mul.Tensor, *node.args))  # nothing is summed
            elif node.target is aten.matmul.default and edit.rank(operand(node, 1)) == 2:
                _linear(edit, node)
            elif node.target is aten.matmul.default:
                _written_out_attention(edit, node)
            elif node.target is aten.pad.default:
                _pad(edit, node)
            elif node.target is aten.mish.default:
                _mish(edit, node)
    for node in [n for n in edit.graph.nodes if n.target is aten.conv2d.default]:
        with edit.before(node):
            of_frames(edit, node)
    prune(edit.graph)


TRUTHS: dict[object, Callable[..., tuple[object, ...]]] = {
    aten.logical_not.default: lambda x: (aten.eq.Scalar, x, 0),
    aten.bitwise_not.default: lambda x: (aten.eq.Scalar, x, 0),
    aten.masked_fill.Scalar: lambda x, mask, value: (aten.where.ScalarSelf, mask, value, x),
    **dict.fromkeys(
        [aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor],
        lambda x, y: (aten.where.ScalarOther, x, y, False),
    ),
    **dict.fromkeys(
        [aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor],
        lambda x, y: (aten.where.ScalarSelf, x, True, y),
    ),
}
"""What operators of truth values are in terms of comparisons and choices."""
POOLS = {aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default}


def _of_truths(edit: Editor, node: fx.Node) -> bool:
    """Whether what looks like an operator of truth values is none of the bits of integers."""
    return node.target is aten.masked_fill.Scalar or edit.value(operand(node, 0)).dtype == torch.bool


def _stored_truths(edit: Editor, node: fx.Node) -> None:
    """Compares stored floats: kernels make truth values, and store none."""
    stored, like = operand(node, 0), operand(node, 1)
    if stored.op == "get_attr":
        name = str(stored.target)
        floats = edit.stored(f"{name}:floats", edit.program.tensors[name].float())
        edit.replace(node, edit.call(aten.ne.Scalar, edit.call(ops.for_each_sample, floats, like), 0))


def _joined_truths(edit: Editor, node: fx.Node) -> None:
    """Computes truth values that are inputs, to be joined with computed ones: kernels join tensors of one type."""
    parts, dim = bound(node, None, 0)
    given = {part for part in parts if part.op == "placeholder"}
    if given and given != set(parts):
        computed = [edit.call(aten.ne.Scalar, part, 0) if part in given else part for part in parts]
        edit.replace(node, edit.call(aten.cat.default, computed, dim))


def _embedded_truths(edit: Editor, node: fx.Node) -> None:
    """Chooses one of two rows by a truth value, where a table is read at what is true as a number."""
    table, index = operand(node, 0), operand(node, 1)
    if table.op != "get_attr" or index.target not in (aten.to.dtype, aten._to_copy.default):
        return
    truth = operand(index, 0)
    if edit.value(truth).dtype == torch.bool:
        name = str(table.target)
        no, yes = (edit.stored(f"{name}:{row}", edit.program.tensors[name][row]) for row in (0, 1))
        edit.replace(node, edit.call(aten.where.self, edit.call(aten.unsqueeze.default, truth, -1), yes, no))


def _double(edit: Editor, node: fx.Node) -> None:
    """Computes in single precision what a model computes in double: kernels have no other floats."""
    if edit.value(node).dtype != torch.float64:
        return
    x = operand(node, 0)
    if edit.value(x).dtype == torch.float32:
        edit.replace(node, x)
    else:
        edit.replace(node, edit.call(aten.to.dtype, x, torch.float32))


def _rows(edit: Editor, node: fx.Node) -> int:
    """The rows that a value [B * rows, ...] has for each sample."""
    two, three = edit.size(node)[0]
    return two // 2 if 3 * two == 2 * three else 1


def _group_norm(edit: Editor, node: fx.Node) -> None:
    """Normalizes pictures: axes are nothing to a norm over all of them, and rows of a sample are further groups."""
    x, groups, weight, bias, eps = bound(node, None, None, None, None, 1e-5)
    rows, (channels, *axes) = _rows(edit, node), (int(d) for d in edit.value(x).shape[1:])
    flat = [math.prod(axes[:-1]), axes[-1]] if len(axes) > 2 else axes
    if rows > 1 and any(w is not None and w.op != "get_attr" for w in (weight, bias)):
        return
    whole = edit.call(aten.reshape.default, x, [-1, rows * channels, *flat])
    weight, bias = (_times(edit, w, rows) for w in (weight, bias))
    made = edit.call(aten.group_norm.default, whole, groups * rows, weight, bias, eps)
    edit.replace(node, made, edit.call(aten.reshape.default, made, [-1, channels, *axes]))


def _times(edit: Editor, stored: fx.Node | None, rows: int) -> fx.Node | None:
    """A stored vector so many times."""
    if stored is None or rows == 1:
        return stored
    name = str(stored.target)
    return edit.stored(f"{name}:{rows}", edit.program.tensors[name].repeat(rows))


def _attention_of_rows(edit: Editor, node: fx.Node) -> None:
    """Makes the rows of a sample further heads of one attention."""
    q, k, v, mask, *others = bound(node, None, None, None, None, 0.0, False)
    rows, rank = _rows(edit, node), edit.rank(node)
    if rank != 4 or mask is not None:
        return
    parts = []
    for part in (q, k, v):
        heads, length, width = (int(d) for d in edit.value(part).shape[1:])
        parts.append(edit.call(aten.reshape.default, part, [-1, rows * heads, length, width]))
    named = {key: value for key, value in node.kwargs.items() if key in ("scale", "enable_gqa")}
    made = edit.call(aten.scaled_dot_product_attention.default, *parts, None, *others, **named)
    sizes = [int(d) for d in edit.value(node).shape[1:]]
    edit.replace(node, made, edit.call(aten.reshape.default, made, [-1, *sizes]))


def _mish(edit: Editor, node: fx.Node) -> None:
    """Writes ``x tanh(log(1 + exp(x)))`` out; where exp(x) is infinite that is x, too."""
    x = operand(node, 0)
    more = edit.call(aten.add.Scalar, edit.call(aten.exp.default, x), 1)
    edit.replace(node, edit.call(aten.mul.Tensor, x, edit.call(aten.tanh.default, edit.call(aten.log.default, more))))


def _average_pool(edit: Editor, node: fx.Node) -> None:
    """Averages blocks that do not overlap: a reshape and a mean."""
    x, kernel, stride, padding = bound(node, None, None, (), 0)
    sizes, axes = [int(d) for d in edit.value(x).shape[1:]], edit.rank(x) - 2
    kernel, stride = list(kernel), list(stride) or list(kernel)
    kernel, stride = (v * axes if len(v) == 1 else v for v in (kernel, stride))
    padded = padding if isinstance(padding, int) else any(padding)
    if kernel != stride or padded or any(size % k for size, k in zip(sizes[1:], kernel, strict=True)):
        edit.program.fallbacks[node.name] = "pooling of blocks that overlap, or do not fit, has no kernel"
        return
    split = [s for size, k in zip(sizes[1:], kernel, strict=True) for s in (size // k, k)]
    blocks = edit.call(aten.reshape.default, x, [-1, sizes[0], *split])
    order = [0, 1, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2)]
    counts = [size // k for size, k in zip(sizes[1:], kernel, strict=True)]
    together = edit.call(aten.reshape.default, edit.permuted(blocks, order), [-1, sizes[0], *counts, math.prod(kernel)])
    edit.replace(node, edit.call(aten.mean.dim, together, [-1]))


PARTS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


def _part(edit: Editor, node: fx.Node) -> None:
    source, index = operand(node, 0), int(arguments(node)[1])
    if source.target not in PARTS:
        return
    x = operand(source, 0)
    if source.target is aten.unbind.int:
        dim = int(bound(source, None, 0)[1]) % edit.rank(x)
        edit.replace(node, edit.call(aten.select.int, x, dim, index))
        return
    dim = int(bound(source, None, None, 0)[2]) % edit.rank(x)
    lengths = [int(part.shape[dim]) for part in edit.value(source)]
    index %= len(lengths)
    start = sum(lengths[:index])
    edit.replace(node, edit.call(aten.slice.Tensor, x, dim, start, start + lengths[index]))


def _slice(edit: Editor, node: fx.Node) -> None:
    """Canonicalizes a slice: begin and end within the dimension; a slice of all of it is its source."""
    x, dim, start, end, step = bound(node, None, 0, None, None, 1)
    dim %= edit.rank(x)
    extent = int(edit.value(x).shape[dim])
    if any(isinstance(v, fx.Node) for v in (start, end)) or edit.size(x)[dim][0] != edit.size(x)[dim][1]:
        return  # of the batch, or of a size that the inputs decide
    start, end, _ = slice(start, end).indices(extent)
    if (start, end, step) == (0, extent, 1):
        node.replace_all_uses_with(x)
        edit.erase(node)
    elif (start, end) != tuple(node.args[2:4]) or node.args[1] != dim:
        edit.replace(node, edit.call(aten.slice.Tensor, x, dim, start, end, *([] if step == 1 else [step])))


def _slice_scatter(edit: Editor, node: fx.Node) -> None:
    """Puts a tensor together of the parts that are written into it, one behind the other or in turns."""
    base, part, dim, start, end, step = bound(node, None, None, 0, None, None, 1)
    dim, extent = dim % edit.rank(node), int(edit.value(node).shape[dim % edit.rank(node)])
    start, end, _ = slice(start, end).indices(extent)
    part = _written(edit, part)
    if step == 1:
        pieces = [(0, start, base), (start, end, part), (end, extent, base)]
        parts = [
            piece if piece is part else edit.call(aten.slice.Tensor, piece, dim, low, high)
            for low, high, piece in pieces
            if low < high
        ]
        edit.replace(node, parts[0] if len(parts) == 1 else edit.call(aten.cat.default, parts, dim))
        return
    turns: dict[int, fx.Node] = {start: part}
    while base.target is aten.slice_scatter.default:
        base, other, *rest = bound(base, None, None, 0, None, None, 1)
        first, last, _ = slice(rest[1], rest[2]).indices(extent)
        if (rest[0] % edit.rank(node), last, rest[3]) != (dim, extent, step):
            return
        turns.setdefault(first, _written(edit, other))
    if end != extent or extent % step or sorted(turns) != [*range(step)]:
        return
    columns = [edit.call(aten.unsqueeze.default, turns[first], dim + 1) for first in range(step)]
    edit.replace(node, edit.call(aten.flatten.using_ints, edit.call(aten.cat.default, columns, dim + 1), dim, dim + 1))


def _select_scatter(edit: Editor, node: fx.Node) -> None:
    """Puts a tensor together of what is before, at and behind the place that is written."""
    base, part, dim, index = bound(node, None, None, 0, 0)
    dim %= edit.rank(node)
    extent = int(edit.value(node).shape[dim])
    index %= extent
    before = [edit.call(aten.slice.Tensor, base, dim, 0, index)] if index else []
    behind = [edit.call(aten.slice.Tensor, base, dim, index + 1, extent)] if index + 1 < extent else []
    own = edit.call(aten.unsqueeze.default, _written(edit, part), dim)
    parts = [*before, own, *behind]
    edit.replace(node, parts[0] if len(parts) == 1 else edit.call(aten.cat.default, parts, dim))


RUNS = 16
"""The most slices that stand for reading by an index."""


def _index(edit: Editor, node: fx.Node) -> None:
    """Reads by a stored index along one dimension as slices, where it goes up by ones but for a few leaps."""
    x, indices = bound(node, None, None)
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].op != "get_attr":
        return
    ((dim, index),) = given
    places = edit.program.tensors[str(index.target)]
    if places.ndim != 1 or places.dtype == torch.bool or not len(places):
        return
    found = (places % int(edit.value(x).shape[dim])).tolist()
    if (made := _read(edit, x, dim, found)) is not None:
        edit.replace(node, made)


def _read(edit: Editor, x: fx.Node, dim: int, places: list[int]) -> fx.Node | None:
    """What lies at places of a dimension, as slices of what goes up by ones; None: these are too many."""
    begins = [i for i in range(len(places)) if not i or places[i] != places[i - 1] + 1]
    if len(begins) > RUNS:
        return None
    runs = zip(begins, [*begins[1:], len(places)], strict=True)
    parts = [edit.call(aten.slice.Tensor, x, dim, places[first], places[last - 1] + 1) for first, last in runs]
    return parts[0] if len(parts) == 1 else edit.call(aten.cat.default, parts, dim)


def _pad(edit: Editor, node: fx.Node) -> None:
    """Pads by values of the tensor itself: they are read."""
    x, pads, mode = bound(node, None, None, "constant")[:3]
    if mode == "constant":
        return
    made: fx.Node | None = x
    for number, (before, behind) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim = edit.rank(x) - 1 - number
        last = int(edit.value(x).shape[dim]) - 1
        wanted = range(-before, last + 1 + behind)
        places = {
            "replicate": [min(max(i, 0), last) for i in wanted],
            "reflect": [last - abs(last - abs(i)) for i in wanted],
            "circular": [i % (last + 1) for i in wanted],
        }[mode]
        if (before or behind) and made is not None:
            made = _read(edit, made, dim, places)
    if made is not None:
        edit.replace(node, made)


def _is_outer(edit: Editor, node: fx.Node) -> bool:
    """Whether a product is one of columns [..., M, 1] and rows [..., 1, N] that no kernel of products takes."""
    left, right = (edit.value(operand(node, index)).shape for index in (0, 1))
    return len(left) > 1 < len(right) != len(left) and left[-1] == 1


def _linear(edit: Editor, node: fx.Node) -> None:
    """Multiplies by a stored matrix as a linear layer does."""
    x, matrix = operand(node, 0), operand(node, 1)
    if matrix.op == "get_attr" and edit.rank(x) > 1:
        name = str(matrix.target)
        weight = edit.stored(f"{name}:transposed", edit.program.tensors[name].T.contiguous())
        edit.replace(node, edit.call(aten.linear.default, x, weight))


def _mean(edit: Editor, node: fx.Node) -> None:
    """Averages neighbouring dimensions as one, and writes sums as averages: kernels average over one dimension."""
    x, dims, keep = bound(node, None, None, False)
    dims = sorted(d % edit.rank(x) for d in (dims or range(edit.rank(x))))
    first, count, summed = dims[0], len(dims), node.target is aten.sum.dim_IntList
    several = count > 1 and dims == [*range(first, first + count)]
    if not first or not (several or summed) or (count > 1 and not several):
        return
    if not edit.value(x).is_floating_point():
        x = edit.call(aten.to.dtype, x, torch.float32)
    sizes = [int(d) for d in edit.value(x).shape[1:]]
    inner = math.prod(sizes[first - 1 : first - 1 + count])
    if several:
        x = edit.call(aten.reshape.default, x, [-1, *sizes[: first - 1], inner, *sizes[first - 1 + count :]])
    made = edit.call(aten.mean.dim, x, [first], keep and not several)
    if keep and several:
        made = edit.call(aten.reshape.default, made, [-1, *(int(d) for d in edit.value(node).shape[1:])])
    edit.replace(node, edit.call(aten.mul.Tensor, made, float(inner)) if summed else made)


def _written(edit: Editor, part: fx.Node) -> fx.Node:
    """What a copy writes."""
    if part.target is aten.copy.default and edit.size(operand(part, 1)) == edit.size(part):
        return operand(part, 1)
    return part


def _stack(edit: Editor, node: fx.Node) -> None:
    parts, dim = bound(node, None, 0)
    dim %= edit.rank(node)
    widened = [edit.call(aten.unsqueeze.default, part, dim) for part in parts]
    edit.replace(node, edit.call(aten.cat.default, widened, dim))


def _einsum(edit: Editor, node: fx.Node) -> None:
    equation, operands = str(node.args[0]).replace(" ", ""), list(arguments(node)[1])
    source, _, target = equation.partition("->")
    if len(operands) == 1 and sorted(source) == sorted(target) and len({*source}) == len(source):
        edit.replace(node, edit.permuted(operands[0], [source.index(letter) for letter in target]))


def _rms_norm(edit: Editor, node: fx.Node) -> None:
    x, shape, weight, eps = bound(node, None, None, None, None)
    if len(shape) == 1:
        edit.replace(node, edit.call(ops.rms_norm, x, weight, torch.finfo(torch.float32).eps if eps is None else eps))
    else:
        edit.program.fallbacks[node.name] = f"rms_norm over {len(shape)} dimensions has no kernel"


def _written_out_attention(edit: Editor, node: fx.Node) -> None:
    """Replaces ``softmax(q @ k) @ v`` by one attention, whose scale is among the products before."""
    weights, v = node.args
    if not isinstance(weights, fx.Node) or weights.target is not aten.softmax.int or not isinstance(v, fx.Node):
        return
    scores, dim = operand(weights, 0), int(arguments(weights)[1])
    if scores.target is not aten.matmul.default or edit.rank(node) != 4 or dim % 4 != 3:
        return
    q, k = operand(scores, 0), operand(scores, 1)
    if edit.rank(q) == edit.rank(k) == edit.rank(v) == 4 and len(weights.users) == len(scores.users) == 1:
        keys = edit.permuted(k, (0, 1, 3, 2))
        edit.replace(
            node, edit.call(aten.scaled_dot_product_attention.default, q, keys, v, None, 0.0, False, scale=1.0)
        )


def _written_out_norm(edit: Editor, node: fx.Node) -> None:
    """Replaces ``x * rsqrt(mean(x^2, -1) + eps)``, and a multiplication by a weight behind it, by one norm."""
    for x, factor in (node.args[:2], node.args[1::-1]):
        if not isinstance(x, fx.Node) or (eps := _root_of_mean_square(edit, factor, x)) is None:
            continue
        scaled = next(iter(node.users)) if len(node.users) == 1 else None
        weight = None
        if scaled is not None and scaled.target is aten.mul.Tensor:
            weight = next((a for a in scaled.args if isinstance(a, fx.Node) and a is not node), None)
        channels = edit.size(x)[-1]
        if weight is None or scaled is None or weight.op != "get_attr" or edit.size(weight) != (channels,):
            edit.replace(node, edit.call(ops.rms_norm, x, None, eps))
        else:
            with edit.before(scaled):
                edit.replace(scaled, edit.call(ops.rms_norm, x, weight, eps))
        return


def _root_of_mean_square(edit: Editor, node: Any, x: fx.Node) -> float | None:
    """The eps of ``node`` where that is rsqrt(mean(x^2 over the last dimension) + eps); None elsewhere."""

    def call_of(value: Any, *targets: Any) -> bool:
        return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets

    if not call_of(node, aten.rsqrt.default) or not call_of(shifted := node.args[0], aten.add.Tensor, aten.add.Scalar):
        return None
    mean, eps = shifted.args[:2]
    if not isinstance(eps, float | int) or not call_of(mean, aten.mean.dim):
        return None
    square, dims, keep = bound(mean, None, None, False)
    if not keep or [d % edit.rank(x) for d in dims] != [edit.rank(x) - 1]:
        return None
    power = call_of(square, aten.pow.Tensor_Scalar) and square.args[1] == 2
    power = power or call_of(square, aten.square.default) or (call_of(square, aten.mul.Tensor) and square.args[1] is x)
    return float(eps) if power and square.args[0] is x else None
