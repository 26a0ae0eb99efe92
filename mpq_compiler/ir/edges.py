"""The tensor edges that layers and attentions read, and the geometry of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.graph import arguments, operand
from mpq_compiler.ir.program import Program


def input_edge(node: fx.Node) -> fx.Node:
    """The node whose value a quantizable call reads."""
    return operand(node, 0)


def attention_edges(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an attention reads as q, k and v; a node that is several of them counts once."""
    return list(dict.fromkeys(operand(node, i) for i in range(3)))


def dynamic_edges(program: Program, attention: bool) -> frozenset[str]:
    """The tensor edges that only linear layers read, and whose rows may thus have scales of their own.

    A convolution sums products of several rows, and so does an attention; ``attention`` says whether these are
    quantized.
    """
    static = {input_edge(n).name for n in program.quantizable if n.target is ops.conv2d}
    if attention:
        static |= {e.name for n in program.attentions for e in attention_edges(n)}
    return frozenset(input_edge(n).name for n in program.quantizable) - static


def attention_arguments(args: Sequence[Any]) -> tuple[int, float | None, Any]:
    """The heads, scale and mask of an `ops.attention` call."""
    heads, scale, mask = (*args[3:], *(None, None))[:3]
    return int(heads), scale, mask


RowGeometry = tuple[tuple[int, ...], ...]
"""The window of a convolution, which with its operand decides its rows; () for a linear layer.

The kernel (kh, kw), the stride (sh, sw), and the padding at the top, bottom, left and right.
"""


def row_geometry(node: fx.Node, weight: Sequence[int]) -> RowGeometry:
    """The geometry of a layer whose stored weight has the shape ``weight``, [O, kh, kw, C] for a convolution.

    Layers with the same operand and geometry multiply the same rows.
    """
    if node.target is not ops.conv2d:
        return ()
    return (tuple(weight[1:3]), *(tuple(a) for a in arguments(node)[3:5]))
