"""The ends of a denoiser, which published methods keep at 8 bits: first and last layers, and the time's embedding."""

from __future__ import annotations

from torch import fx

from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.graph import CONTRACTIONS, depending
from mpq_compiler.ir.program import Program
from mpq_compiler.sampling.call_tree import TIME


def ends(program: Program) -> set[str]:
    """Finds the weights of the ends by their paths (of the time, the first and the last convolution in MPQ-DM's code).

    They follow from structure, never from names:

    - A first layer reads the latents, and a last one is read by the output, with no other layer between.
    - Layers of the time's embedding depend on no other input, and several layers that do not depend on the latents read
      what they make; so do those before them. What one block makes of the time is the block's.
    """
    graph, layers = program.graph, program.quantizable
    latents, *others = (spec.name for spec in program.inputs if spec.name != TIME)
    first = {n for x in graph.nodes if x.op == "placeholder" and x.target == latents for n in _readers(x)}
    last = {n for n in layers if graph.output_node() in _readers(n)}
    timed = {*layers} & depending(graph, TIME) - depending(graph, latents)
    alone = timed.difference(*(depending(graph, name) for name in others))
    embedding: set[fx.Node] = set()
    for node in reversed(layers):
        readers = _readers(node) & timed
        if node in alone and (len(readers) > 1 or readers & embedding):
            embedding.add(node)
    return {str(weight_path(n)) for n in first.union(last, embedding) & {*layers}}


def _readers(node: fx.Node) -> set[fx.Node]:
    """The layers that a value reaches with no other between, and the output if it does."""
    found: set[fx.Node] = set()
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users.keys() - seen:
            seen.add(user)
            if user.op == "output" or user.target in CONTRACTIONS:
                found.add(user)
            else:
                pending.append(user)
    return found
