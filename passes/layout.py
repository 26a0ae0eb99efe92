"""Channels-last activations, token-major attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mpq_compiler import ops
from mpq_compiler.aten import aten, interior_permutes, is_movement, is_permute, is_pointwise
from mpq_compiler.pass_manager import Contract, Pass, Session
from mpq_compiler.program import Program, Stage, arguments, copy_graph, function_of, operand, prune, shapes

TO_CHANNELS_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1)}
TO_CHANNELS_FIRST = {3: (0, 2, 1), 4: (0, 3, 1, 2)}


@dataclass(frozen=True)
class Layout(Pass):
    """Rewrites images to [B, H, W, C] and attention operands to [B, T, heads*D]; permutes remain at the ends only.

    Three kinds of rules, applied until nothing changes: an operator becomes its channels-last form between two
    permutes; a permute sinks below pointwise operators and concatenations; a chain of data movement becomes the single
    reshape or permute that it amounts to (found by running it on indices), or nothing.

        %conv_in                       = aten.conv2d(%sample, .weight, .bias, [1,1], [1,1])
        %down_blocks_0_resnets_0_norm1 = aten.group_norm(%conv_in, 8, .weight, .bias, 1e-05, false)
      =>
        %permute_default               = aten.permute(%sample, [0,2,3,1])
        %conv_in                       = mpq::conv2d(%permute_default, .weight:ohwi, .bias, ..., padding=[1,1,1,1])
        %down_blocks_0_resnets_0_norm1 = mpq::group_norm(%conv_in, .weight, .bias, groups=8, eps=1e-05)
    """

    contract: ClassVar[Contract] = Contract.REWRITE
    requires: ClassVar[frozenset[str]] = frozenset({"graph"})
    provides: ClassVar[frozenset[str]] = frozenset({"channels-last"})

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork(stage=Stage.REWRITTEN)
        graph = program.graph
        sizes = shapes(program, 2)
        for node in list(graph.nodes):
            rule = CHANNELS_LAST.get(node.target) if node.op == "call_function" else None
            if rule is not None:
                rule(program, node, sizes)
        prune(graph)
        changed = True
        while changed:
            changed = sink_permutes(program)
            changed |= simplify_movement(program)
        keep_names(program)
        for node in interior_permutes(program.graph):
            program.fallbacks[node.name] = "data is permuted between two kernels"
        return program


# --- operators between two permutes -------------------------------------------------------------------------


def _permuted(graph: fx.Graph, x: fx.Node, order: Sequence[int]) -> fx.Node:
    return graph.call_function(aten.permute.default, (x, list(order)))


def _replace(node: fx.Node, new: fx.Node, back: fx.Node) -> None:
    node.replace_all_uses_with(back)
    new.meta["origin"] = node.meta.get("origin", node.name)


def _convolution(program: Program, node: fx.Node, sizes: dict[str, Any]) -> None:
    x, weight, bias, stride, padding, dilation, groups = _bound(node, None, None, None, (1, 1), (0, 0), (1, 1), 1)
    if not isinstance(padding, Sequence) or isinstance(padding, str) or any(d != 1 for d in dilation):
        program.fallbacks[node.name] = "convolution with dilation or named padding stays channels-first"
        return
    if weight.op != "get_attr":
        program.fallbacks[node.name] = "convolution whose weight is computed stays channels-first"
        return
    graph = program.graph
    ph, pw = (padding[0], padding[-1])
    top, bottom, left, right = ph, ph, pw, pw
    if x.target in (aten.pad.default, aten.constant_pad_nd.default) and _pads_with_zero(x):
        before = x.args[1]
        left, right, top, bottom = left + before[0], right + before[1], top + before[2], bottom + before[3]
        x = x.args[0]
    name = str(weight.target)
    with graph.inserting_before(node):
        last = graph.get_attr(program.tensors.add(name + ":ohwi", program.tensors[name].permute(0, 2, 3, 1)))
        image = _permuted(graph, x, TO_CHANNELS_LAST[4])
        spatial = ([stride[0], stride[-1]], [top, bottom, left, right])
        new = graph.call_function(ops.conv2d, (image, last, bias, *spatial, groups))
        back = _permuted(graph, new, TO_CHANNELS_FIRST[4])
    _replace(node, new, back)


def _pads_with_zero(node: fx.Node) -> bool:
    pad, *rest = arguments(node)[1:]
    mode = rest[0] if rest and isinstance(rest[0], str) else node.kwargs.get("mode", "constant")
    value: Any = next((r for r in rest if isinstance(r, int | float)), node.kwargs.get("value")) or 0
    return mode == "constant" and value == 0 and isinstance(pad, Sequence) and len(pad) == 4 and min(pad) >= 0


def _group_norm(program: Program, node: fx.Node, sizes: dict[str, Any]) -> None:
    x, groups, weight, bias, eps = _bound(node, None, None, None, None, 1e-5)
    rank = sizes[node.name].dim()
    if rank not in TO_CHANNELS_LAST:
        program.fallbacks[node.name] = f"group_norm of {rank} dimensions has no channels-last form"
        return
    graph = program.graph
    with graph.inserting_before(node):
        rows = _permuted(graph, x, TO_CHANNELS_LAST[rank])
        new = graph.call_function(ops.group_norm, (rows, groups, weight, bias, eps))
        back = _permuted(graph, new, TO_CHANNELS_FIRST[rank])
    _replace(node, new, back)


def _upsample(program: Program, node: fx.Node, sizes: dict[str, Any]) -> None:
    x = operand(node, 0)
    before, after = sizes[x.name].shape, sizes[node.name].shape
    factors = [after[2] // before[2], after[3] // before[3]]
    if (before[2] * factors[0], before[3] * factors[1]) != (after[2], after[3]):
        program.fallbacks[node.name] = "upsampling by a fraction has no kernel"
        return
    graph = program.graph
    with graph.inserting_before(node):
        image = _permuted(graph, x, TO_CHANNELS_LAST[4])
        new = graph.call_function(ops.upsample_nearest2d, (image, factors))
        back = _permuted(graph, new, TO_CHANNELS_FIRST[4])
    _replace(node, new, back)


def _attention(program: Program, node: fx.Node, sizes: dict[str, Any]) -> None:
    q, k, v, mask, _, causal = _bound(node, None, None, None, None, 0.0, False)
    shape = sizes[node.name].shape
    if len(shape) != 4 or causal or node.kwargs.get("enable_gqa"):
        program.fallbacks[node.name] = "causal, grouped-query or non-4D attention has no kernel"
        return
    if mask is not None and sizes[mask.name].dtype == torch.bool:
        program.fallbacks[node.name] = "attention with a boolean mask has no kernel"
        return
    graph = program.graph
    heads = shape[1]
    with graph.inserting_before(node):
        rows = []
        for x in (q, k, v):
            size = sizes[x.name].shape
            major = _permuted(graph, x, (0, 2, 1, 3))
            rows.append(graph.call_function(aten.reshape.default, (major, [-1, size[2], heads * size[3]])))
        scale = node.kwargs.get("scale")
        new = graph.call_function(ops.attention, (*rows, heads, scale, mask))
        split = graph.call_function(aten.reshape.default, (new, [-1, shape[2], heads, shape[3]]))
        back = _permuted(graph, split, (0, 2, 1, 3))
    _replace(node, new, back)


CHANNELS_LAST = {
    aten.conv2d.default: _convolution,
    aten.group_norm.default: _group_norm,
    aten.upsample_nearest2d.vec: _upsample,
    aten.scaled_dot_product_attention.default: _attention,
}


def _bound(node: fx.Node, *defaults: Any) -> list[Any]:
    """The first ``len(defaults)`` arguments by their position in the schema, keyword or not; ``defaults`` fill up."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values = [*node.args[: len(defaults)], *defaults[len(node.args) :]]
    names = [a.name for a in node.target._schema.arguments]
    for key, value in node.kwargs.items():
        if names.index(key) < len(values):
            values[names.index(key)] = value
    return values


# --- permutes sink ------------------------------------------------------------------------------------------


def sink_permutes(program: Program) -> bool:
    """``f(permute(x), y) -> permute(f(x, unpermute(y)))`` for pointwise f and concatenations; True if one moved."""
    graph = program.graph
    sizes = shapes(program, 2)
    changed = False
    for node in list(graph.nodes):
        if node.target is aten.transpose.int or node.target is aten.t.default:
            _as_permute(graph, node, sizes)
            changed = True
            continue
        joined = node.target is aten.cat.default
        if not (is_pointwise(node) or joined):
            continue
        operands = list(arguments(node)[0]) if joined else [a for a in node.args if isinstance(a, fx.Node)]
        source = next((a for a in operands if is_permute(a)), None)
        if source is None:
            continue
        order = [int(d) for d in arguments(source)[1]]
        inverse = [order.index(d) for d in range(len(order))]
        with graph.inserting_before(node):
            moved = {a: _inverse_operand(graph, a, order, inverse, sizes) for a in operands}
            if joined:
                dim = int(node.args[1]) if len(node.args) > 1 else 0
                new = graph.call_function(aten.cat.default, ([moved[a] for a in operands], order[dim]))
            else:
                new = graph.call_function(node.target, tuple(moved.get(a, a) for a in node.args), dict(node.kwargs))
            back = _permuted(graph, new, order)
        for created in (*moved.values(), new, back):
            _measure(created, sizes)
        _replace(node, new, back)
        graph.erase_node(node)
        changed = True
    prune(graph)
    return changed


def _measure(node: fx.Node, sizes: dict[str, Any]) -> None:
    """Adds the meta value of a new call whose operands are known."""
    if node.name not in sizes:
        args = fx.map_arg(node.args, lambda n: sizes[n.name])
        sizes[node.name] = function_of(node)(*args, **node.kwargs)


def _as_permute(graph: fx.Graph, node: fx.Node, sizes: dict[str, Any]) -> None:
    x = operand(node, 0)
    order = list(range(sizes[x.name].dim()))
    a, b = (0, 1) if node.target is aten.t.default else arguments(node)[1:3]
    order[a], order[b] = order[b], order[a]
    with graph.inserting_before(node):
        new = _permuted(graph, x, order)
    sizes[new.name] = sizes[node.name]
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _inverse_operand(
    graph: fx.Graph, x: fx.Node, order: list[int], inverse: list[int], sizes: dict[str, Any]
) -> fx.Node:
    if is_permute(x) and list(arguments(x)[1]) == order:
        return operand(x, 0)
    value = sizes[x.name]
    if not isinstance(value, Tensor) or value.dim() == 0:
        return x
    for _ in range(len(order) - value.dim()):
        x = graph.call_function(aten.unsqueeze.default, (x, 0))
        _measure(x, sizes)
    return _permuted(graph, x, inverse)


# --- data movement ------------------------------------------------------------------------------------------


def simplify_movement(program: Program) -> bool:
    """Each chain of data movement becomes what it amounts to; True if the graph changed."""
    graph = program.graph
    two, three = shapes(program, 2), shapes(program, 3)
    changed = False
    for node in list(graph.nodes):
        if not is_movement(node) or all(is_movement(u) for u in node.users):
            continue
        chain = [node]
        while is_movement(source := operand(chain[-1], 0)):
            chain.append(source)
        simple = _amounts_to(source, chain, two, three)
        if simple is None or (len(chain) == 1 and _is_canonical(node, simple)):
            continue
        new = source
        with graph.inserting_before(node):
            for target, argument in simple:
                new = graph.call_function(target, (new, argument))
        node.replace_all_uses_with(new)
        changed = True
    prune(graph)
    return changed


def _is_canonical(node: fx.Node, simple: list[tuple[Any, list[int]]]) -> bool:
    return len(simple) == 1 and node.target is simple[0][0] and list(arguments(node)[1]) == simple[0][1]


def _amounts_to(
    source: fx.Node, chain: list[fx.Node], two: dict[str, Any], three: dict[str, Any]
) -> list[tuple[Any, list[int]]] | None:
    """The chain as at most a permute and a reshape of ``source``, or None where it is neither."""
    shape = two[source.name].shape
    indices = torch.arange(two[source.name].numel(), dtype=torch.int32).reshape(shape)
    moved = indices
    for node in reversed(chain):
        rest = fx.map_arg(node.args[1:], lambda n: two[n.name])
        moved = function_of(node)(moved, *rest, **node.kwargs)
    out, larger = moved.shape, three[chain[0].name].shape
    varying = [d for d in range(len(out)) if out[d] != larger[d]]
    if len(varying) > 1:
        return None
    target = [-1 if d in varying else int(out[d]) for d in range(len(out))]
    if torch.equal(moved.flatten(), indices.flatten()):
        return [] if out == shape else [(aten.reshape.default, target)]
    if len(shape) > 6:
        return None
    for order in itertools.permutations(range(len(shape))):
        permuted = indices.permute(order)
        if torch.equal(permuted.flatten(), moved.flatten()):
            steps: list[tuple[Any, list[int]]] = [(aten.permute.default, list(order))]
            return steps if permuted.shape == out else [*steps, (aten.reshape.default, target)]
    return None


# --- names and counts ---------------------------------------------------------------------------------------


def keep_names(program: Program) -> None:
    """A rewritten call keeps the name of the call it stands for."""
    taken = {n.name for n in program.graph.nodes}
    for node in program.graph.nodes:
        origin = node.meta.pop("origin", None)
        if origin and origin not in taken:
            taken.discard(node.name)
            node.name = origin
            taken.add(origin)
    program.graph = copy_graph(program.graph)
