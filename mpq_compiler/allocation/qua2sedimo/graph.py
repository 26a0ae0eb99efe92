"""The dependency graph of a denoiser's layers, and the units of layers that are scored together.

A node is a call of a layer, or a call that *combines* values of different origin: an addition, a concatenation, an
attention. Everything else (norms, activations, rearrangements, constants) is contracted: its readers read what it reads
(Qua2SeDiMo, arXiv 2412.14628, section 3.1). The graph follows from structure alone, so every model has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import fx

from mpq_compiler.ir import blocks
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.printer import operator_name
from mpq_compiler.ir.program import Program

HOPS = 3
"""How many steps a unit reaches back from its root, and thus how many attention layers of the predictor it needs."""
UNIT_LAYERS = 4
"""The most layers of a unit, those of an attention; with 6 formats they have 1296 variants."""


@dataclass(frozen=True)
class Node:
    """A layer's call, or a combination."""

    name: str
    """The name of the call."""
    path: str | None
    """The path of the layer's weight; None for a combination."""
    operation: str
    """The call's role in its block: the path of its module there ("attn1.to_q"), or the operator that combines."""
    block: str
    """The path of the block."""
    block_type: str
    """The class of a repeated block's module; the path of a layer that stands alone."""
    index: int
    """The place of the block in the order of execution."""
    sources: tuple[int, ...]
    """The places of the nodes that it reads."""


@dataclass(frozen=True)
class Unit:
    """A rooted subgraph: layers whose formats are chosen together, scored by the embedding of the root."""

    layers: tuple[int, ...]
    """The places of its layers in the graph, in the order of execution; the last is the root."""
    nodes: tuple[int, ...]
    """The places of the layers and of the combinations between them."""
    hops: int
    """The number of steps from the root to the farthest layer."""

    @property
    def root(self) -> int:
        """The place of its last layer."""
        return self.layers[-1]


@dataclass(frozen=True)
class Graph:
    """The dependency graph: nodes in the order of execution; a place is an index into them."""

    nodes: tuple[Node, ...]

    @property
    def layers(self) -> list[int]:
        """The places of the layers."""
        return [place for place, node in enumerate(self.nodes) if node.path is not None]

    def kind(self, unit: Unit) -> str:
        """The kind of a unit: the type of its block, and the common prefix of its layers' operations."""
        root = self.nodes[unit.root]
        parts = zip(*(self.nodes[place].operation.split(".") for place in unit.layers), strict=False)
        common = [part for part, *_ in takewhile(lambda p: len({*p}) == 1, parts)]
        return " ".join(dict.fromkeys([root.block_type, ".".join(common)])).strip()

    def within(self, root: int, hops: int) -> set[int]:
        """The places of the nodes from which ``hops`` steps reach the root: its embedding depends on them alone."""
        found = {root}
        for _ in range(hops):
            found |= {source for place in found for source in self.nodes[place].sources}
        return found


def of(program: Program, model: torch.nn.Module) -> Graph:
    """Builds the dependency graph of a program in float; the model's modules tell the blocks."""
    repeated = blocks.repeated(model)
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    sources: dict[fx.Node, tuple[int, ...]] = {}
    order: dict[str, int] = {}
    nodes: list[Node] = []
    for call in program.graph.nodes:
        read = [sources[n] for n in call.all_input_nodes if sources.get(n)]
        joined = tuple(sorted({place for places in read for place in places}))
        path = weight_path(call)
        if path is None and len({*read}) < 2:
            sources[call] = joined
            continue
        if path is not None:
            block = blocks.block_of(path, repeated)
            kind = classes[block] if block in repeated else block
            operation = path.removesuffix(".weight").removeprefix(block).removeprefix(".") or block
        else:  # in the block of the layer before it: residual additions are still its own
            before = nodes[-1]
            block, kind, operation = before.block, before.block_type, re.split(r"\W+", operator_name(call.target))[-1]
        place = order.setdefault(block, len(order))
        sources[call] = (len(nodes),)
        nodes.append(Node(call.name, path, operation, block, kind, place, joined))
    return Graph(tuple(nodes))


def units(graph: Graph, hops: int = HOPS, most: int = UNIT_LAYERS) -> list[Unit]:
    """Partitions the layers into units, in the order of their roots.

    A unit starts at the last layer that is in none yet, and goes back through combinations to other layers of its
    block: the queries, keys, values and output of an attention, the layers of a feed-forward network, the convolutions
    and the time embedding of a residual block. It ends at combinations one operand of which depends on another, such as
    residual additions and skip concatenations. A weight that several calls read is in the unit of its last call.

    Args:
        graph: the dependency graph.
        hops: the most steps back from the root.
        most: the most layers of a unit.
    """
    above = _ancestors(graph)
    taken: set[str] = set()
    found = []
    for root in reversed(graph.layers):
        path = str(graph.nodes[root].path)
        if path in taken:
            continue
        taken.add(path)
        distance, edge = {root: 0}, [root]
        for step in range(1, hops + 1):
            sources = sorted({s for place in edge for s in graph.nodes[place].sources} - distance.keys(), reverse=True)
            edge = []
            for place in sources:
                node = graph.nodes[place]
                if node.path is None:
                    if _closes(node, above):
                        continue
                elif (
                    node.path in taken
                    or node.block != graph.nodes[root].block
                    or sum(graph.nodes[p].path is not None for p in distance) == most
                ):
                    continue
                else:
                    taken.add(node.path)
                distance[place] = step
                edge.append(place)
        layers = tuple(sorted(place for place in distance if graph.nodes[place].path is not None))
        reach = max(distance[place] for place in layers)
        nodes = tuple(sorted(place for place, far in distance.items() if far <= reach))
        found.append(Unit(layers, nodes, reach))
    return sorted(found, key=lambda unit: unit.root)


def alone(graph: Graph) -> list[Unit]:
    """Makes every weight a unit of its own, without hops, to score operations rather than blocks."""
    last = {str(graph.nodes[place].path): place for place in graph.layers}
    return [Unit((place,), (place,), 0) for place in sorted(last.values())]


def neighbours(graph: Graph, nodes: Sequence[int]) -> list[list[int]]:
    """The adjacency lists of a subgraph: for each of ``nodes`` its own position and those of the nodes it reads."""
    position = {place: i for i, place in enumerate(nodes)}
    return [[i, *(position[s] for s in graph.nodes[p].sources if s in position)] for i, p in enumerate(nodes)]


def by_path(graph: Graph, choices: Mapping[str, int], nodes: Iterable[int]) -> list[int]:
    """The choice of each node: its weight's, or 0 for a combination."""
    return [choices[path] if (path := graph.nodes[place].path) is not None else 0 for place in nodes]


def _ancestors(graph: Graph) -> list[set[int]]:
    found: list[set[int]] = []
    for node in graph.nodes:
        found.append({*node.sources}.union(*(found[source] for source in node.sources)))
    return found


def _closes(node: Node, above: Sequence[set[int]]) -> bool:
    """Whether one operand of a combination depends on another operand of it."""
    return any(a in above[b] for a in node.sources for b in node.sources)
