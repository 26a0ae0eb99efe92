"""The groups of layers to which MixDQ gives budgets of their own, content and quality, found by structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from mpq_compiler.allocation.sensitivity_table import CONTENT, QUALITY
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import UNARY, aten, is_movement, is_pointwise
from mpq_compiler.ir.graph import depending, operand, weight_of
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program

_ACTIVATIONS = UNARY - {aten.neg.default, aten.to.dtype, aten._to_copy.default}
_PARTS = (aten.slice.Tensor, aten.split.Tensor, aten.chunk.default, aten.cat.default, ops.prepend)


def groups(program: Program) -> dict[str, str]:
    """Assigns each weight, by its path, to "content" or "quality" (MixDQ, arXiv 2405.17873, section 4.2).

    Content are the feed-forward layers of transformer blocks and the layers of cross-attentions, which decide what is
    in the image. Quality are all others. Both kinds are recognized by structure, never by names:

    - A feed-forward layer computes tokens [B, T, C] of the latent that another feed-forward layer reads through a
      nonlinearity, with nothing but pointwise calls and movements between; or it is that other layer.
    - A cross-attention has queries that depend on the latent, and keys and values that do not. Its layers are those
      that compute these, and those that read its output.

    A weight is content where any call of it is.
    """
    found = {_path(node): QUALITY for node in program.quantizable}
    for node in content(program):
        found[_path(node)] = CONTENT
    return found


def _path(node: fx.Node) -> str:
    return str(weight_of(node)).split(":")[0]


def content(program: Program) -> list[fx.Node]:
    """The calls of content layers, in graph order."""
    latent, sizes = depending(program.graph, program.inputs[0].name), shapes(program, 2)
    tokens = {n for n in program.quantizable if n in latent and _by_tokens(n, sizes)}
    chosen: set[fx.Node] = set()
    for node in tokens:
        inner = {layer for layer, bent in _layers_before(operand(node, 0), _passes).items() if bent} & tokens
        chosen |= {node, *inner} if inner else set()
    for node in program.graph.nodes:
        if node.target is ops.attention and _is_cross(node, latent):
            made = (_layers_before(operand(node, i), _computes) for i in range(3))
            read = {n for n in program.quantizable if node in _through(operand(n, 0))}
            chosen = chosen.union(read, *made)
    return [node for node in program.quantizable if node in chosen]


def _is_cross(node: fx.Node, latent: set[fx.Node]) -> bool:
    q, k, v = (operand(node, i) for i in range(3))
    return q in latent and k not in latent and v not in latent


def _by_tokens(node: fx.Node, sizes: dict[str, Any]) -> bool:
    return node.target is aten.linear.default and sizes[node.name].dim() == 3


def _layers_before(x: fx.Node, passes: Callable[[fx.Node], bool]) -> dict[fx.Node, bool]:
    """The layers from which ``x`` follows by calls that satisfy ``passes``; true for those behind a nonlinearity."""
    found: dict[fx.Node, bool] = {}
    pending, seen = [(x, False)], set()
    while pending:
        place = source, bent = pending.pop()
        if place in seen:
            continue
        seen.add(place)
        if weight_of(source) is not None:
            found[source] = found.get(source, False) or bent
        elif passes(source):
            pending += [(n, bent or source.target in _ACTIVATIONS) for n in source.all_input_nodes]
    return found


def _through(x: fx.Node) -> Iterator[fx.Node]:
    """The call itself, and the calls before it whose elements it holds in another order."""
    yield x
    while is_movement(x):
        x = operand(x, 0)
        yield x


def _computes(node: fx.Node) -> bool:
    """Whether a node computes: queries and keys may be normalized and rotated on the way to an attention."""
    return node.op == "call_function"


def _passes(node: fx.Node) -> bool:
    return is_pointwise(node) or is_movement(node) or node.target in _PARTS
