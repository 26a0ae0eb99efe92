"""Grafts the decisions of a compilation onto the graph of another kind of calls, so that both share the weights.

Calls that differ in shapes, in Python values or in the inputs that they give have graphs of their own. One kind of
calls is calibrated, planned and rounded. The laid-out graph of another is matched with the one of that kind, call by
call, and each matched call becomes what passes made of its counterpart, with its codes, its scales and its rotations:

    here    %conv_in = mpq::conv2d(%sample, .weight, .bias)   =>   mpq::conv2d(%sample_q, %conv_in_w, .bias:corrected)
    there   %conv_in = mpq::conv2d(%sample, .weight, .bias)   =>   the same
            %gain    = aten.mul(%conv_in, %scale)             =>   itself, in float

A layer that reads a tensor which the calibrated calls do not have reads it as it is, without a quantizer, for its range
is not known. A layer whose weight the calibrated calls never read has no codes, and the calls are refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import fx
from torch.fx.node import Argument

from mpq_compiler.ir import ops, views
from mpq_compiler.ir.costs import stored_dtype, weight_path
from mpq_compiler.ir.edges import attention_arguments
from mpq_compiler.ir.findings import ATTENTION_NUMERICS
from mpq_compiler.ir.graph import function_of, operand, prune, softmax, weight_of
from mpq_compiler.ir.program import Program, Stage
from mpq_compiler.ir.verifier.view import View
from mpq_compiler.support.errors import UserError

UNKNOWN = "reads a tensor that only some kinds of calls have, whose range is not known: computed in float"
"""The reason for which a layer of a grafted program is a float one."""


def matches(here: Program, there: Program) -> dict[fx.Node, fx.Node]:
    """The counterparts in ``here`` of the calls in ``there``: of one operator and module, in one order.

    A layer has one wherever it is called.
    """
    inputs = {n.target: n for n in here.graph.nodes if n.op == "placeholder"}
    left, right = ([n for n in p.graph.nodes if n.op == "call_function"] for p in (here, there))
    keys, others = ([_key(node) for node in nodes] for nodes in (left, right))
    numbers: dict[object, int] = {}
    codes, theirs = ([numbers.setdefault(key, len(numbers)) for key in each] for each in (keys, others))
    blocks = difflib.SequenceMatcher(None, codes, theirs, autojunk=False).get_matching_blocks()
    found = {right[b + i]: left[a + i] for a, b, size in blocks for i in range(size)}
    taken = {*found.values()}
    layers: dict[str | None, fx.Node] = {}
    for node in here.quantizable:
        if node not in taken or weight_path(node) not in layers:
            layers[weight_path(node)] = node
    for node in there.quantizable:
        if node not in found and weight_path(node) in layers:
            found[node] = layers[weight_path(node)]  # called elsewhere, or more often
    given = (n for n in there.graph.nodes if n.op == "placeholder" and n.target in inputs)
    return found | {node: inputs[node.target] for node in given}


def _key(node: fx.Node) -> tuple[object, ...]:
    parameters = tuple(str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
    stored = tuple(name for name in parameters if not name.startswith("constant."))
    return (node.target, re.sub(r"_\d+$", "", node.name), stored)


class Copied(NamedTuple):
    """A node of the new graph, and whether it stands for the tensor whose copy it is."""

    node: fx.Node
    same: bool


Boundary = Mapping[fx.Node, Copied]
"""The operands of a call: new nodes, by those of the rewritten program that they stand for."""


class _Lost(Exception):
    """A call was rewritten to something that the other graph has no place for."""


def graft(here: Program, there: Program, after: Program, tag: str) -> Program:
    """Makes of another graph what passes have made of its counterpart.

    Args:
        here: the laid-out program of the calibrated calls.
        there: the laid-out program of other calls.
        after: what passes made of ``here``, before anything was packed.
        tag: ends the names of what only the others have.

    Raises:
        UserError: a layer was never calibrated, or was rewritten to what does not fit the other calls.
    """
    return _Graft(here, there, after, tag).program()


class _Graft:
    def __init__(self, here: Program, there: Program, after: Program, tag: str) -> None:
        self.here, self.there, self.after, self.tag = here, there, after, tag
        self.match = matches(here, there)
        self.made_of = {node.name: node for node in after.graph.nodes}
        """What passes made of the values in ``here``, by their names."""
        self.known = {n.name for n in here.graph.nodes if n.op != "get_attr"}
        self.read = {weight_path(n) for n in here.quantizable}
        self.quantizers = {n.args[0]: n for n in after.graph.nodes if n.target in views.FAKE_QUANTIZERS}
        self.back = {self.made_of[h.name]: t for t, h in self.match.items() if h.name in self.made_of}
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        """New nodes by those of ``there``."""
        self.origins: dict[fx.Node, fx.Node] = {}
        self.calls: dict[tuple[str, ...], fx.Node] = {}
        self.taken: set[str] = set()
        self.fallbacks: dict[str, str] = {}

    def program(self) -> Program:
        nodes = [*self.there.graph.nodes]
        for node in nodes:
            if node.op == "placeholder":
                self._keep(node, self._named(self.graph.placeholder(str(node.target)), node.name))
        for node in nodes:
            if node.op == "call_function":
                self._keep(node, self._call(node))
            elif node.op == "output":
                self.graph.output(self.values[operand(node, 0)])
        made = self.after.fork(graph=self.graph, inputs=self.there.inputs)
        prune(made.graph)
        made.fallbacks = {**self.fallbacks, **made.fallbacks}
        _fit_plans(made)
        return made

    def _keep(self, node: fx.Node, new: fx.Node) -> None:
        self.values[node] = new
        self.origins.setdefault(new, node)
        if (reason := self.there.fallbacks.get(node.name)) is not None:
            self.fallbacks.setdefault(new.name, reason)

    def _call(self, node: fx.Node) -> fx.Node:
        counterpart = self.match.get(node)
        if counterpart is None or counterpart.name not in self.made_of:
            return self._alone(node)
        try:
            return self._rewritten(node, counterpart, self.made_of[counterpart.name])
        except _Lost:
            return self._alone(node)

    def _rewritten(self, node: fx.Node, before: fx.Node, after: fx.Node) -> fx.Node:
        """What became of the call: ``before`` it was laid out in ``here``, and ``after`` is what passes made of it."""
        boundary: dict[fx.Node, Copied] = {}
        for theirs, ours in _pairs(before.args, node.args):
            if theirs.name in self.made_of:
                made = Copied(self.values[ours], self.match.get(ours) is theirs)
                if boundary.setdefault(self.made_of[theirs.name], made) != made:
                    raise _Lost
        equal = self._equal(before.args, node.args) and before.kwargs == node.kwargs
        if after.target is ops.fake_quantize_attention:
            return self._attention(node, after, boundary)
        if equal:
            return self._copy(after, boundary, root=True).node
        if after.target is not before.target or len(after.args) != len(before.args):
            raise _Lost
        args = [
            self._argument(after.args[i], before.args[i], value, boundary)
            if i < len(before.args)
            else self._mapped(value)
            for i, value in enumerate(node.args)
        ]
        kwargs = {**after.kwargs, **fx.map_arg(node.kwargs, self._value)}
        return self._made(function_of(after), tuple(args), kwargs, after.name)

    def _attention(self, node: fx.Node, after: fx.Node, boundary: Boundary) -> fx.Node:
        """A quantized attention, with heads, scale and mask of the call; a float one where an operand has no range."""
        parts = [self._copy(operand(after, i), boundary) for i in range(6)]
        if not all(part.same and part.node.target in views.FAKE_QUANTIZERS for part in parts[:3]):
            made = self._alone(node)
            self.fallbacks.setdefault(made.name, UNKNOWN)
            return made
        further = [self._mapped(value) for value in attention_arguments(node.args)]
        args = (*(part.node for part in parts), *further, after.args[-1])
        return self._made(function_of(after), args, dict(after.kwargs), after.name)

    def _argument(self, after: Argument, before: Argument, now: Argument, boundary: Boundary) -> Argument:
        """An argument of a rewritten call: ``before`` in ``here``, and ``now`` in ``there``."""
        if all(isinstance(value, list | tuple) for value in (after, before, now)):
            if len(after) == len(before) == len(now):  # type: ignore[arg-type]
                return [self._argument(*three, boundary) for three in zip(after, before, now, strict=True)]  # type: ignore[arg-type]
        elif isinstance(before, fx.Node) and isinstance(now, fx.Node) and isinstance(after, fx.Node):
            if before.op != "get_attr" or self._equal(before, now):
                return self._copy(after, boundary).node
        elif self._equal(before, now):
            return fx.map_arg(after, lambda n: self._copy(n, boundary).node)
        if _plain(after) != _plain(before):
            raise _Lost
        return self._mapped(now)

    def _alone(self, node: fx.Node) -> fx.Node:
        """The call as it is. UserError: a layer that has no codes, or whose codes were made for another call."""
        path = weight_path(node) if weight_of(node) is not None else None
        if path is not None and path not in self.read:
            raise UserError(
                f"the layer '{path.rpartition('.')[0] or path}' is computed in the latter alone and has no scales: "
                "record more of these, for calls of the most frequent kind are calibrated"
            )
        if path in self.after.weights:
            raise UserError(f"a pass rewrote the layer '{path}', which depends on what differs")
        name = node.name if node.name not in self.made_of else f"{node.name}_{self.tag}"
        return self._made(function_of(node), self._mapped(node.args), fx.map_arg(node.kwargs, self._value), name)

    def _mapped(self, value: Argument) -> Argument:
        """An argument in ``there``, as it is in the new graph."""
        return fx.map_arg(value, self._value)

    def _value(self, node: fx.Node) -> fx.Node:
        if node.op != "get_attr":
            return self.values[node]
        name, tensor = str(node.target), self.there.tensors[str(node.target)]
        if name.startswith("constant."):
            name = f"{name}@{self.tag}"
        if self.after.stage is Stage.FAKE_QUANTIZED and (kind := stored_dtype(name, tensor)) != tensor.dtype:
            name, tensor = f"{name}:f16", tensor.to(kind)
        return self._stored(self.after.tensors.add(name, tensor.contiguous()))

    def _stored(self, name: str) -> fx.Node:
        if ("get_attr", name) not in self.calls:
            read = self.graph.get_attr(name)
            self.calls["get_attr", name] = self._named(read, "p_" + re.sub(r"\W", "_", name))
        return self.calls["get_attr", name]

    def _made(self, target: Callable[..., object], args: Argument, kwargs: dict[str, Argument], name: str) -> fx.Node:
        """A call; the one that is there already, where it is equal."""
        assert isinstance(args, tuple)
        key = (str(target), repr(args), repr(kwargs))
        if key not in self.calls:
            self.calls[key] = self._named(self.graph.call_function(target, args, kwargs), name)
        return self.calls[key]

    def _named(self, node: fx.Node, name: str) -> fx.Node:
        number, node.name = 0, name
        while node.name in self.taken:
            number += 1
            node.name = f"{name}_{self.tag}_{number}"
        self.taken.add(node.name)
        return node

    def _copy(self, node: fx.Node, boundary: Boundary, root: bool = False) -> Copied:
        """A copy of a node of the rewritten program, and of what it reads up to the boundary."""
        if node in boundary and not root:
            return boundary[node]
        if node.op == "get_attr":
            return Copied(self._stored(str(node.target)), True)
        if node.op == "placeholder" or (node.name in self.known and not root):
            there = self.back.get(node)
            if there is None or there not in self.values:
                raise _Lost
            return Copied(self.values[there], True)
        parts = {n: self._copy(n, boundary) for n in node.all_input_nodes}
        if node.target in views.FAKE_QUANTIZERS and node.target is not ops.dynamic_fake_quantize:
            source = parts[operand(node, 0)]
            if not source.same:
                return self._requantized(source)
        args = fx.map_arg(node.args, lambda n: parts[n].node)
        kwargs = fx.map_arg(node.kwargs, lambda n: parts[n].node)
        made = self._made(function_of(node), args, kwargs, node.name)
        if node.target in views.FLOAT_LAYERS:
            was, now = operand(node, 0), operand(made, 0)
            if was.target in views.FAKE_QUANTIZERS and now.target not in views.FAKE_QUANTIZERS:
                self.fallbacks.setdefault(made.name, UNKNOWN)
        return Copied(made, all(part.same for part in parts.values()))

    def _requantized(self, source: Copied) -> Copied:
        """A tensor with the quantizer that other layers read it with; itself, where there is none."""
        origin = self.match.get(self.origins.get(source.node, source.node))
        edge = None if origin is None else self.made_of.get(origin.name)
        if edge is None or edge not in self.quantizers:
            return source
        return self._copy(self.quantizers[edge], {edge: Copied(source.node, True)})

    def _equal(self, before: Argument, now: Argument) -> bool:
        """Whether two arguments have one structure, and equal numbers and constants."""
        if isinstance(before, fx.Node) and isinstance(now, fx.Node):
            if before.op != now.op or before.op != "get_attr":
                return "get_attr" not in (before.op, now.op)
            first, second = str(before.target), str(now.target)
            if first == second and not first.startswith("constant."):
                return True
            one, other = self.here.tensors[first], self.there.tensors[second]
            return one.dtype == other.dtype and torch.equal(one, other)
        if isinstance(before, list | tuple) and isinstance(now, list | tuple):
            return len(before) == len(now) and all(self._equal(*two) for two in zip(before, now, strict=True))
        return type(before) is type(now) and before == now


def _pairs(before: Argument, now: Argument) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The computed operands that stand in the same places."""
    if isinstance(before, fx.Node) and isinstance(now, fx.Node):
        if "get_attr" not in (before.op, now.op):
            yield before, now
    elif isinstance(before, list | tuple) and isinstance(now, list | tuple):
        for two in zip(before, now, strict=False):
            yield from _pairs(*two)


def _plain(value: Argument) -> str:
    """An argument as text, in which a read of a tensor in f16 is a read of the tensor."""
    return repr(fx.map_arg(value, lambda n: str(n.target).removesuffix(":f16") if n.op == "get_attr" else n.name))


def _fit_plans(program: Program) -> None:
    """Leaves the plans of what the program computes."""
    names = {node.name for node in program.graph.nodes}
    paths = View(program).paths
    sites = {path: tuple(name for name, p in paths.items() if p == path) for path in program.weights}
    program.weights = {path: replace(plan, sites=sites[path]) for path, plan in program.weights.items() if sites[path]}
    edges = {operand(n, 0).name for n in program.graph.nodes if n.target in views.FAKE_QUANTIZERS}
    edges |= {softmax(n.name) for n in program.graph.nodes if n.target is ops.fake_quantize_attention}
    program.activations = {edge: plan for edge, plan in program.activations.items() if edge in edges}
    if (chosen := program.facts.get(ATTENTION_NUMERICS)) is not None:
        program.facts[ATTENTION_NUMERICS] = {name: kind for name, kind in chosen.items() if name in names}
