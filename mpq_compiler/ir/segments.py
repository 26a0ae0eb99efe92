"""Segments of a graph: where to cut it, and backward passes that hold one segment's activations at a time.

A cut between two calls is crossed by the values that were made before it and are read behind it, a UNet's skip
connections among them. Cuts are made where these are few: behind a residual addition, rather than inside an attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.ir.interpreter import Interpreter, last_uses, shapes, value_nbytes
from mpq_compiler.ir.program import Program
from mpq_compiler.support.usage import trim

HELD = 1 << 28
"""The bytes that a segment holds of one input, where what crosses the cuts does not take more."""

Value = Any
"""A value of a node, and what autograd leaves untyped."""


def held_bytes(program: Program, batch: int) -> dict[str, int]:
    """The bytes that a backward pass holds for each call, by its name: its value, and the tensors that it reads.

    These are widened for each pass (`TensorStore.read`), and those of a model more than memory holds.
    """
    found = value_bytes(program, batch)
    for node in program.graph.nodes:
        if node.name in found:
            read = (program.tensors.meta(str(n.target)) for n in node.all_input_nodes if n.op == "get_attr")
            found[node.name] += sum(map(value_nbytes, read))
    return found


def value_bytes(program: Program, batch: int) -> dict[str, int]:
    """The bytes of the value of each call at a batch size, by the call's name."""
    sizes = shapes(program, batch)
    calls = [n.name for n in program.graph.nodes if n.op in ("call_function", "call_module")]
    return {name: value_nbytes(sizes[name]) for name in calls}


def ends(program: Program, costs: Mapping[str, int], bound: int) -> list[str]:
    """Cuts a graph into segments that cost at most ``bound`` each where no call alone costs more.

    Args:
        program: has the graph.
        costs: of calls by name, such as `value_bytes`.
        bound: of the costs of a segment.

    Returns:
        The last call of each segment, in order. Of the cuts that leave a segment half of the bound or more it is the
        one that the fewest bytes cross, the first of several.
    """
    return _ends(program, costs, bound, value_bytes(program, 1))


def _ends(program: Program, costs: Mapping[str, int], bound: int, sizes: Mapping[str, int]) -> list[str]:
    """`ends`, given `value_bytes` at batch 1."""
    calls = [n for n in program.graph.nodes if n.op in ("call_function", "call_module")]
    if not calls:
        return []
    crossing = _crossing_bytes(program, calls, sizes)
    found, start, spent = [], 0, 0
    while start < len(calls):
        stop, spent, half = start, 0, start
        while stop < len(calls) and (stop == start or spent + costs.get(calls[stop].name, 0) <= bound):
            spent += costs.get(calls[stop].name, 0)
            half = stop + 1 if 2 * spent < bound else half
            stop += 1
        if stop < len(calls):
            half = min(half, stop - 1)
            stop = min(range(half + 1, stop + 1), key=lambda cut: crossing[cut - 1])
        found.append(calls[stop - 1].name)
        start = stop
    return found


@dataclass(frozen=True)
class Plan:
    """Where a graph is cut, and what going back through it then holds."""

    last: list[str]
    """The last call of each segment, in order."""
    bytes: int
    """What crosses the cuts, of one input, and the most that a segment costs."""


def leanest(program: Program, costs: Mapping[str, int], bound: int) -> Plan:
    """The cuts by the bound, raised by halves as often as that takes least memory in all.

    What crosses a cut is held from the way forth on: of a deep model whose weights are larger than the bound, which is
    cut behind every layer, more than longer segments would take.

    Args:
        program: has the graph.
        costs: of calls by name, such as `held_bytes`.
        bound: the least that a segment may cost.
    """
    sizes, whole = value_bytes(program, 1), sum(costs.values())
    bounds = [bound]
    while bounds[-1] < whole:
        bounds.append(bounds[-1] + -(-bounds[-1] // 2))
    plans = []
    for one in bounds:
        last = _ends(program, costs, one, sizes)
        plans.append(Plan(last, _held(program, costs, last, sizes)))
    return min(plans, key=lambda plan: plan.bytes)


def _held(program: Program, costs: Mapping[str, int], last: Sequence[str], sizes: Mapping[str, int]) -> int:
    """The bytes of the values that cross cuts, and what the most expensive segment costs."""
    names, spent, piece = set(last), [0], {}
    for node in program.graph.nodes:
        piece[node] = len(spent)
        spent[-1] += costs.get(node.name, 0)
        if node.name in names:
            spent.append(0)
    crossing = (node for node, own in piece.items() if any(piece[user] > own for user in node.users))
    return sum(sizes.get(node.name, 0) for node in crossing) + max(spent)


def _crossing_bytes(program: Program, calls: Sequence[fx.Node], sizes: Mapping[str, int]) -> list[int]:
    """The bytes at batch 1 that cross the cut behind each call: of values that follow from inputs."""
    place = {node: index for index, node in enumerate(calls)}
    varying = _varying(program.graph)
    change = [0] * (len(calls) + 1)
    for node, made in place.items():
        if node in varying:
            change[made] += sizes[node.name]
            change[max([made, *(place.get(user, len(calls)) for user in node.users)])] -= sizes[node.name]
    found, alive = [], 0
    for step in change[:-1]:
        alive += step
        found.append(alive)
    return found


def _varying(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values follow from inputs."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


@dataclass(frozen=True)
class _Slice:
    """Consecutive nodes of a graph."""

    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    """What they read of earlier slices, in graph order."""
    last_use: Mapping[fx.Node, Sequence[fx.Node]]
    """The operands that no later node reads, by the node that reads them last."""


def _slices(graph: fx.Graph, last: Sequence[str]) -> list[_Slice]:
    """Slices a graph behind each of the nodes in ``last``; the output node is in none."""
    names, found, last_use = set(last), [], last_uses(graph)
    nodes: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue  # read where a segment uses it
        if node.op != "output":
            nodes.append(node)
        if nodes and (node.name in names or node.op == "output"):
            own = set(nodes)
            sources = (source for n in nodes for source in n.all_input_nodes if source not in own)
            read = dict.fromkeys(source for source in sources if source.op != "get_attr")
            found.append(_Slice(tuple(nodes), tuple(read), last_use))
            nodes = []
    return found


def backward(
    interpreter: Interpreter,
    inputs: Mapping[str, Tensor],
    last: Sequence[str],
    gradients: Callable[[Tensor], Sequence[Tensor]],
    begin: Callable[[int], None] = lambda number: None,
) -> Tensor:
    """Runs a program and goes back through it, with the activations of one segment at a time.

    Values that cross a cut are kept, and each segment is computed once more on the way back (Chen 2016, arXiv
    1604.06174). Gradients come to the leaves among inputs and attributes, in ``grad``, and to the hooks of values; they
    are those of one backward pass through the whole graph, bit for bit, because the contributions to a value are added
    in the same order: those of later calls first.

    Args:
        interpreter: computes nodes; called without gradients on the way forth, and with them on the way back.
        inputs: of the program, by name.
        last: the last call of each segment (`ends`).
        gradients: makes the gradients of the output, one for each way back; segments are computed once for all.
        begin: is called with the number of a way back before it goes on through a segment.

    Returns:
        The output, without gradients, on the interpreter's device.
    """
    graph = interpreter.program.graph
    slices = _slices(graph, last)
    result = graph.output_node().args[0]
    assert isinstance(result, fx.Node), "a program of several outputs has no one gradient"
    places = [n for n in graph.nodes if n.op == "placeholder"]
    specs = interpreter.program.inputs
    given = {node: inputs[spec.name].to(interpreter.device) for node, spec in zip(places, specs, strict=True)}
    crossing = {source for piece in slices for source in piece.reads} | {result}
    kept: dict[fx.Node, Value] = {}
    differentiable: set[fx.Node] = set()

    def watch(node: fx.Node, value: Value) -> None:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if floating and (value.requires_grad or not differentiable.isdisjoint(node.all_input_nodes)):
            differentiable.add(node)

    with torch.no_grad():
        for piece in slices:
            kept |= _run(interpreter, piece, kept | given, crossing, watch)
    output: Tensor = kept[result].detach()
    carried: list[dict[fx.Node, Tensor]] = [{result: gradient} for gradient in gradients(output)]
    for piece in reversed(slices):
        arrived: dict[fx.Node, Tensor] = {}
        with torch.enable_grad():
            enter: Callable[..., Tensor] = _Border.apply
            reads = [n for n in piece.reads if n in differentiable]
            leaves = {n: enter(kept[n].detach().requires_grad_(), n, arrived) for n in reads}
            made = _run(interpreter, piece, kept | given | leaves, crossing)
            for number, carry in enumerate(carried):
                begin(number)
                roots = [(value, carry.pop(n)) for n, value in made.items() if n in carry]
                # made last, a view hands on the gradient of later segments before those of this one are added to it
                roots += [(leaf.view_as(leaf), carry[n]) for n, leaf in leaves.items() if n in carry]
                roots = [(value, gradient) for value, gradient in roots if value.requires_grad]
                if roots:
                    values, arriving = zip(*roots, strict=True)
                    torch.autograd.backward(values, arriving, retain_graph=number + 1 < len(carried))
                carry |= arrived
                arrived.clear()
        for node in made:
            del kept[node]
        del made, leaves
        trim()  # what the C library keeps between blocks grows from segment to segment, to twice of what is held
    return output


class _Border(torch.autograd.Function):
    """A value that enters a segment: puts its gradient into a dictionary as it arrives.

    ``grad`` would have the strides of the value, with which torch may sum in another order.
    """

    @staticmethod
    def forward(ctx: Value, value: Tensor, node: fx.Node, arrived: dict[fx.Node, Tensor]) -> Tensor:
        ctx.node, ctx.arrived = node, arrived
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Value, *gradients: Tensor) -> Value:
        (ctx.arrived[ctx.node],) = gradients
        return None, None, None


def _run(
    interpreter: Interpreter,
    piece: _Slice,
    known: Mapping[fx.Node, Value],
    crossing: set[fx.Node],
    watch: Callable[[fx.Node, Value], None] = lambda node, value: None,
) -> dict[fx.Node, Value]:
    """Computes the nodes of a slice from known values, and returns the values of those that later slices read."""
    env: dict[fx.Node, Value] = {n: known[n] for n in piece.reads}
    for node in piece.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in env:
                env[source] = interpreter.evaluate(source, env)
                watch(source, env[source])
        env[node] = known[node] if node.op == "placeholder" else interpreter.evaluate(node, env)
        watch(node, env[node])
        for dead in piece.last_use.get(node, ()):
            if dead not in crossing:
                del env[dead]
    return {node: env[node] for node in piece.nodes if node in crossing}
