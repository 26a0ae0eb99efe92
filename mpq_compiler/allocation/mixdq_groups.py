"""Content and quality: the groups of layers that MixDQ gives budgets of their own, found by structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from mpq_compiler.allocation.sensitivity_table import CONTENT, QUALITY
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import UNARY, aten, is_movement, is_pointwise
from mpq_compiler.ir.graph import operand, weight_of
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program

_ACTIVATIONS = UNARY - {aten.neg.default, aten.to.dtype, aten._to_copy.default}
_PARTS = (aten.slice.Tensor, aten.split.Tensor, aten.chunk.default, aten.cat.default, ops.prepend)


def groups(program: Program) -> dict[str, str]:
    """Of each weight, by its path, the group: "content" or "quality" (MixDQ, arXiv 2405.17873, section 4.2).

    Content are the feed-forward layers of transformer blocks, and the layers of cross-attentions, which decide what is
    in the image; quality are all others. A feed-forward layer computes tokens [B, T, C] of the latent that another such
    layer reads through a nonlinearity and nothing but pointwise calls and movements, or is that other. A
    cross-attention has keys and values that do not depend on the latent, and queries that do; its layers are those that
    make them, and those that read what it gives. A weight is content where any call of it is. Reads nothing of names.
    """
    found = {_path(node): QUALITY for node in program.quantizable}
    for node in content(program):
        found[_path(node)] = CONTENT
    return found


def _path(node: fx.Node) -> str:
    return str(weight_of(node)).split(":")[0]


def content(program: Program) -> list[fx.Node]:
    """The calls of content layers, in graph order."""
    latent, sizes = _of_the_latent(program), shapes(program, 2)
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


def _of_the_latent(program: Program) -> set[fx.Node]:
    """What depends on the latent, which is the denoiser's first input."""
    found = {n for n in program.graph.nodes if n.op == "placeholder" and n.target == program.inputs[0].name}
    for node in program.graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _is_cross(node: fx.Node, latent: set[fx.Node]) -> bool:
    q, k, v = (operand(node, i) for i in range(3))
    return q in latent and k not in latent and v not in latent


def _by_tokens(node: fx.Node, sizes: dict[str, Any]) -> bool:
    return node.target is aten.linear.default and sizes[node.name].dim() == 3


def _layers_before(x: fx.Node, passes: Callable[[fx.Node], bool]) -> dict[fx.Node, bool]:
    """The layers from which ``x`` is made by calls that ``passes`` alone; whether through a nonlinearity."""
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
    """The call itself, and those whose elements it holds in another order."""
    yield x
    while is_movement(x):
        x = operand(x, 0)
        yield x


def _computes(node: fx.Node) -> bool:
    """Queries and keys may be normalized and turned by their positions on the way to an attention."""
    return node.op == "call_function"


def _passes(node: fx.Node) -> bool:
    return is_pointwise(node) or is_movement(node) or node.target in _PARTS
