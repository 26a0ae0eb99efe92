"""Canonicalizes calls that torch spells in several ways, so that passes and backends know one form of each."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
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
            elif node.target is aten.rms_norm.default:
                _rms_norm(edit, node)
            elif node.target is aten.mul.Tensor:
                _written_out_norm(edit, node)
    prune(edit.graph)


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
