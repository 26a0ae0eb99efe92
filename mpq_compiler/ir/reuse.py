"""Values that steps of a sampler keep: where a network can be cut, and programs of steps that keep and that reuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.fx.node import Argument

from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten, interior_permutes
from mpq_compiler.ir.costs import macs
from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.graph import depending, operand, prune
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import InputSpec, Program
from mpq_compiler.ir.specialization import Specialization
from mpq_compiler.sampling.reuse import KEPT, OUTPUT, SLOTS, WEIGHTS, Schedule

REUSE = Fact[Schedule]("reuse")
"""What steps reuse, where a budget of time asked for it."""
KEEPING, REUSING = "keeping", "reusing"
"""The ends of the names of functions of steps that keep a value, and of steps that reuse one."""
LEAST, MOST = 0.25, 0.97
"""The share of the multiplications that a cut within the network is worth considering for."""
ALIKE, APART = 0.02, 0.1
"""Cuts whose shares differ by no more are one, with the smallest value; those considered differ by so much."""


@dataclass(frozen=True)
class Cut:
    """A value that a step can take from earlier ones."""

    node: str
    inside: frozenset[str]
    """The nodes that are computed for nothing but this value, itself among them."""
    share: float
    """The share of the multiply-accumulates of a call."""


def cuts(program: Program, most: int, largest: float = 1.0) -> list[Cut]:
    """Where a laid-out program can be cut, by structure alone: at most so many, by descending share up to the largest.

    A step that has the value of a node need not compute what the output reads through it alone. Of the inner parts of a
    UNet behind each skip (DeepCache, arXiv 2312.00858) and of the blocks of a transformer, the node is the one behind.
    The first cut is behind the whole network (AdaptiveDiffusion, arXiv 2410.09873).
    """
    work, sizes = macs(program), shapes(program, 1)
    changing, behind = depending(program.graph, program.inputs[0].name), _behind(program.graph)
    inside = {node: work.get(node.name, 0) for node in program.graph.nodes}
    for node, reader in reversed(behind.items()):  # in the order of the graph
        inside[reader] += inside[node]
    total = sum(work.values())
    found: list[tuple[float, int, fx.Node]] = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node not in changing or not torch.is_tensor(sizes.get(node.name)):
            continue
        value, share = sizes[node.name], inside[node] / total
        if value.dtype != torch.float32 or value.dim() < 3 or value.shape[0] != 1:
            continue
        if LEAST <= share <= min(largest, MOST):
            found.append((share, value.numel(), node))
    found.sort(key=lambda each: -each[0])
    every = frozenset(node.name for node in program.graph.nodes)
    chosen = [Cut(OUTPUT, every, 1.0)] if most and largest >= 1 else []
    while found and len(chosen) < most:
        share, _, node = min((each for each in found if each[0] >= found[0][0] - ALIKE), key=lambda each: each[1])
        chosen.append(Cut(node.name, _inside(node, behind), share))
        found = [each for each in found if each[0] < share - APART]
    return chosen


def _behind(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The next node behind each that is on every way from it to the output: its immediate post-dominator."""
    behind: dict[fx.Node, fx.Node] = {}
    depth = {graph.output_node(): 0}
    for node in reversed(graph.nodes):
        readers = [user for user in node.users if user in depth]
        if not readers:
            continue
        common, *others = readers
        for other in others:
            while common is not other:
                if depth[common] < depth[other]:
                    other = behind[other]
                else:
                    common = behind[common]
        behind[node], depth[node] = common, depth[common] + 1
    return behind


def _inside(node: fx.Node, behind: dict[fx.Node, fx.Node]) -> frozenset[str]:
    """The names of a node and of what only it needs."""
    found = {node}
    for other, reader in behind.items():  # from the end of the graph
        if reader in found:
            found.add(other)
    return frozenset(each.name for each in found)


def mark(program: Program, name: str) -> None:
    """Puts ``mpq::keep`` behind a node: it takes the name, by which plans know the value, and its readers.

    The output needs no mark: who calls has it.
    """
    if name == OUTPUT:
        return
    node = program.node(name)
    with program.graph.inserting_after(node):
        kept = program.graph.call_function(ops.keep, (node,))
    node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)
    node.name = f"{name}_computed"
    kept.name = name


def marked(program: Program) -> fx.Node | None:
    """The node that keeps a value; None where none does."""
    return next((node for node in program.graph.nodes if node.target is ops.keep), None)


def kept_shape(program: Program) -> tuple[int, ...]:
    """The shape of a sample of the value that a program keeps."""
    node = marked(program)
    assert node is not None
    return tuple(shapes(program, 1)[node.name].shape[1:])


def keeping(program: Program) -> Program:
    """The program whose output [B, n] has that of each sample and, behind it, the value that is kept, both flat."""
    made = program.fork()
    node, output, sizes = marked(made), made.graph.output_node(), shapes(program, 1)
    assert node is not None
    with made.graph.inserting_before(output):
        flat = [
            _named(f"{each.name}_flat", made.graph, aten.reshape.default, each, [-1, sizes[each.name].numel()])
            for each in (operand(output, 0), node)
        ]
        output.args = (_named(f"{node.name}_beside", made.graph, aten.cat.default, flat, 1),)
    for moved in interior_permutes(made.graph):
        made.fallbacks.setdefault(moved.name, "the output is put into one row with the value that is kept")
    return made


def reusing(program: Program) -> Program:
    """The program that reads `KEPT` and `WEIGHTS` behind its inputs, and sums them in place of computing the value."""
    made = program.fork()
    node, shape, graph = marked(made), kept_shape(program), made.graph
    assert node is not None
    added = (InputSpec(KEPT, ("B", SLOTS, *shape), torch.float32), InputSpec(WEIGHTS, ("B", SLOTS), torch.float32))
    made.inputs = (*program.inputs, *added)
    read = []
    with graph.inserting_after([n for n in graph.nodes if n.op == "placeholder"][-1]):
        kept = graph.placeholder(KEPT)
    with graph.inserting_after(kept):
        weights = graph.placeholder(WEIGHTS)
    with graph.inserting_before(node):
        for slot in range(SLOTS):
            value = _named(f"{node.name}_slot{slot}", graph, aten.select.int, kept, 1, slot)
            weight = _named(f"{node.name}_weight{slot}", graph, aten.select.int, weights, 1, slot)
            scale = _named(f"{node.name}_scale{slot}", graph, aten.reshape.default, weight, [-1, *[1] * len(shape)])
            read.append(_named(f"{node.name}_term{slot}", graph, aten.mul.Tensor, value, scale))
        total, *others = read
        for slot, term in enumerate(others, 1):
            total = _named(f"{node.name}_sum{slot}", graph, aten.add.Tensor, total, term)
    node.replace_all_uses_with(total)
    prune(graph)
    total.name = node.name  # by which plans know it
    _drop_unread(made)
    return made


def _named(name: str, graph: fx.Graph, target: Callable[..., object], *args: Argument) -> fx.Node:
    """Inserts a call of a name that no region has; those that fx makes up may be in one."""
    node = graph.call_function(target, args)
    node.name = name
    return node


def _drop_unread(program: Program) -> None:
    """Drops what is said of nodes that are no longer there: regions, plans, fallbacks."""
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_module"}
    program.regions = {name: region for name, region in program.regions.items() if name in called}
    names = {n.name for graph in (program.graph, *program.regions.values()) for n in graph.nodes}
    for path, plan in [*program.weights.items()]:
        program.weights[path] = replace(plan, sites=tuple(site for site in plan.sites if site in names))
        if not program.weights[path].sites:
            del program.weights[path]
    edges = {quantizer.edge for quantizer in views.quantizers_of(views.flatten(program))}
    program.activations = {edge: plan for edge, plan in program.activations.items() if edge in edges}
    program.fallbacks = {name: reason for name, reason in program.fallbacks.items() if name in names}


def specializations(program: Program, batches: Sequence[int]) -> list[Specialization]:
    """The programs of steps that keep and that reuse beside a packed one, where it keeps a value."""
    if marked(program) is None:
        return []
    kinds = {KEEPING: keeping(program), REUSING: reusing(program)}
    return [Specialization(made, tuple(batches), step=step) for step, made in kinds.items()]
