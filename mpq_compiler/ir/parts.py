"""A float program and its simulation, cut into the same parts, each a program of its own.

What crosses a cut are values that both programs compute; quantizers and weights are computed anew in every part that
reads them, so that they can change until the part that reads them first is done with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpq_compiler.ir.graph import arguments, prune
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import InputSpec, Program


@dataclass(frozen=True)
class Part:
    """What lies between two cuts, by the names of values that both programs compute."""

    inputs: tuple[str, ...]
    """What it reads of earlier parts, inputs of the program among them."""
    outputs: tuple[str, ...]
    """What later parts read of it; of the last part the program's output."""


def parts(programs: Sequence[Program], last: Sequence[str]) -> list[Part]:
    """Cuts programs behind the calls named in ``last``.

    Args:
        programs: the float program, and others that compute its values under the same names.
        last: the last call of each part, in order; the last part goes on to the output.

    Only values with one row for each sample cross cuts: others follow from such values, or from no input at all.
    """
    reference = programs[0]
    places = dict(_places(reference, last))
    for program in programs[1:]:
        names = {node.name for node in program.graph.nodes}
        places = {name: place for name, place in places.items() if name in names}
    reads: list[set[str]] = [set() for _ in range(max(places.values()) + 1)]
    made: list[set[str]] = [set() for _ in reads]
    for program in programs:
        for node in program.graph.nodes:
            if node.op == "output":
                for name in _nearest(node, places):
                    made[places[name]].add(name)
            elif (place := places.get(node.name, -1)) >= 0:
                for name in _nearest(node, places):
                    if places[name] < place:
                        reads[place].add(name)
                        if places[name] >= 0:
                            made[places[name]].add(name)
    order = {name: number for number, name in enumerate(places)}
    found = [Part(*(tuple(sorted(names, key=order.__getitem__)) for names in both))
             for both in zip(reads, made, strict=True)]  # fmt: skip
    return [part for part in found if part.outputs]


def _places(program: Program, last: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The part of each value that can cross a cut; -1 for inputs."""
    few, many = shapes(program, 2), shapes(program, 3)
    result = program.graph.output_node().args[0]
    for node in program.graph.nodes:
        if node.op == "placeholder":
            yield node.name, -1
    place = 0
    for node in program.graph.nodes:
        if node.op in ("call_function", "call_module"):
            if node is result or _has_rows(few[node.name], many[node.name]):
                yield node.name, place
            if node.name in last[place : place + 1] and place + 1 < len(last):
                place += 1


def _has_rows(few: object, many: object) -> bool:
    """Whether a value has a row for each sample, given its shape for two samples and for three."""
    if not isinstance(few, Tensor) or not isinstance(many, Tensor) or not few.dim():
        return False
    return (few.shape[0], many.shape[0]) == (2, 3) and few.shape[1:] == many.shape[1:]


def _nearest(node: fx.Node, places: Collection[str]) -> set[str]:
    """The names among ``places`` from which a node's value follows without another of them between."""
    found: set[str] = set()
    seen: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        source = stack.pop()
        if source.name in places:
            found.add(source.name)
        elif source not in seen:
            seen.add(source)
            stack.extend(source.all_input_nodes)
    return found


def extract(program: Program, inputs: Iterable[str], outputs: Sequence[str], sizes: dict[str, Tensor]) -> Program:
    """The program of a part: what computes ``outputs`` from ``inputs``; nodes keep their names.

    Args:
        program: has the nodes.
        inputs: names of the values that it reads.
        outputs: names of the values that it computes, a tuple of them.
        sizes: a value of each input with any number of rows, such as meta tensors (`interpreter.shapes`).
    """
    known = dict.fromkeys(inputs)
    needed: set[fx.Node] = set()
    named = {node.name: node for node in program.graph.nodes}
    stack = [named[name] for name in outputs]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(() if node.name in known else node.all_input_nodes)
    graph, here = fx.Graph(), dict[fx.Node, fx.Node]()
    for name in known:
        here[named[name]] = graph.placeholder(name)
        here[named[name]].name = name
    for node in program.graph.nodes:
        if node in needed and node not in here:
            here[node] = graph.node_copy(node, here.__getitem__)
            here[node].name = node.name
    graph.output(tuple(here[named[name]] for name in outputs))
    prune(graph)
    specs = tuple(InputSpec(name, ("B", *sizes[name].shape[1:]), sizes[name].dtype) for name in known)
    return program.fork(graph=graph, inputs=specs)


def joined(program: Program, factors: Sequence[float]) -> Program:
    """A program of several outputs with one: each of them flat [B, ...], times its factor, side by side."""
    program = program.fork()
    output = program.graph.output_node()
    (values,) = arguments(output)
    with program.graph.inserting_before(output):
        flat = [
            program.graph.call_function(torch.mul, (program.graph.call_function(torch.flatten, (node, 1)), factor))
            for node, factor in zip(values, factors, strict=True)
        ]
        output.args = (program.graph.call_function(torch.cat, (flat, 1)),)
    return program
