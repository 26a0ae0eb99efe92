"""Specializes a packed program to further image sizes, which share its weights.

A program is traced, calibrated, planned and packed at one size. Only numbers among the arguments of calls (shapes,
bounds of slices) and constants that the trace computed (position embeddings) depend on the size. So the model is traced
and laid out again at the other size, the two laid-out graphs are compared, and wherever they differ the packed graph
gets the other's values:

    here    %reshape_1 = aten.reshape(%pos_embed_proj, [-1,64,32])     %pos_embed = aten.add(%reshape_1, .pos_embed)
    there   %reshape_1 = aten.reshape(%pos_embed_proj, [-1,192,32])    %pos_embed = aten.add(%reshape_1, constant.to)

Codes, scales and every decision remain those of the first size. A model cannot be specialized if its graph differs at
the other size, or if a pass rewrote a call that depends on the size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpq_compiler.driver.options import Options, parse_shapes
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import ops
from mpq_compiler.ir.costs import stored_dtype
from mpq_compiler.ir.graph import operand, prune
from mpq_compiler.ir.program import Program, Stage, TensorStore
from mpq_compiler.ir.specialization import Specialization, size_text
from mpq_compiler.ir.verifier import VerificationError, verify
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError

LAID_OUT = "channels-last"
"""The property that the last pass to run at every size provides; later passes see channels, not images."""


def is_laid_out(step: Pass) -> bool:
    """Whether the program after this pass is the laid-out one, which is compared between sizes."""
    return LAID_OUT in step.provides


def laid_out(here: Program, denoiser: Denoiser, size: tuple[int, int], passes: Sequence[Pass]) -> Program:
    """Traces and lays out the program at another size of latents, before anything is measured.

    Args:
        here: the laid-out program at the first size.
        denoiser: the model.
        size: height and width of the latents.
        passes: of the compilation; they run up to the one that lays out.

    Raises:
        UserError: the model does not take the size, or its graph differs.
    """
    there = traced(denoiser.resized(*size), passes)
    list(_differences(here, there, (size_text(here), size_text(there))))
    return there


def traced(denoiser: Denoiser, passes: Sequence[Pass]) -> Program:
    """Traces and lays out the program of a denoiser, by those of the passes that do so."""
    end = next(i for i, step in enumerate(passes) if is_laid_out(step)) + 1
    empty = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
    there, _ = manager.run_pipeline(passes[:end], empty, Session(denoiser))
    return there


def added_bytes(program: Program, others: Sequence[Specialization]) -> int:
    """The stored bytes of tensors that only the other sizes read."""
    known = _reads(program)
    names = sorted(set().union(*(_reads(other.program) for other in others)) - known)
    return sum(program.tensors[name].nbytes for name in names)


def _reads(program: Program) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}


def transplant(packed: Program, here: Program, there: Program) -> Program:
    """Specializes a packed program to another size; constants are added to the common store of tensors.

    Args:
        packed: the packed program at the first size.
        here: the laid-out program at the first size.
        there: the laid-out program at the other size.

    Raises:
        UserError: a pass rewrote a call that depends on the size.
    """
    sizes = size_text(here), size_text(there)
    made = packed.fork(inputs=there.inputs)
    changes = dict(_differences(here, there, sizes))
    for call, region in _calls(made):
        found = changes.pop(call.name, None)
        if found is None:
            continue
        before, after = found
        if call.target is not before.target or len(call.args) != len(before.args):
            raise _refusal(sizes, f"a pass rewrote '{call.name}' ({ops.name_of(before.target)}), which depends on it")
        site = _Site(made, call, region, here, there, sizes)
        call.args = tuple(site.changed(*three) for three in zip(call.args, before.args, after.args, strict=True))
    if changes:
        raise _refusal(sizes, f"a pass removed '{next(iter(changes))}', which depends on it")
    prune(made.graph)
    try:
        verify(made)
    except VerificationError as error:
        raise _refusal(sizes, f"the packed program does not fit it ({error})") from error
    return made


def _refusal(sizes: tuple[str, str], reason: str) -> UserError:
    return UserError(
        f"one artifact cannot hold the sizes {sizes[0]} and {sizes[1]}: {reason}; compile one artifact for each"
    )


def _calls(program: Program) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """All operator calls, each with the call of its region, or None."""
    for node in program.graph.nodes:
        if node.op == "call_function":
            yield node, None
        elif node.op == "call_module":
            inside = program.regions[str(node.target)].nodes
            yield from ((call, node) for call in inside if call.op == "call_function")


def _differences(
    here: Program, there: Program, sizes: tuple[str, str]
) -> Iterator[tuple[str, tuple[fx.Node, fx.Node]]]:
    """The calls whose numbers or constants differ: (name, (call here, call there)). UserError: the graphs differ."""
    left, right = ([n for n in p.graph.nodes if n.op != "get_attr"] for p in (here, there))
    other: dict[fx.Node, fx.Node] = {}
    for a, b in zip(left, right, strict=False):
        if a.op != b.op or (a.op == "call_function" and a.target is not b.target):
            raise _refusal(sizes, f"'{a.name}' ({ops.name_of(a.target)}) is {ops.name_of(b.target)} at the second")
        other[a] = b
        equal = _equal(a.args, b.args, here, there, other)
        keywords = a.kwargs.keys() == b.kwargs.keys() and all(
            _equal(value, b.kwargs[key], here, there, other) for key, value in a.kwargs.items()
        )
        if equal is None or not keywords:
            raise _refusal(sizes, f"'{a.name}' ({ops.name_of(a.target)}) reads other operands at the second")
        if not equal:
            yield a.name, (a, b)
    if len(left) != len(right):
        raise _refusal(sizes, f"the model makes {len(left)} calls at the first and {len(right)} at the second")


def _equal(a: Any, b: Any, here: Program, there: Program, other: dict[fx.Node, fx.Node]) -> bool | None:
    """Whether two arguments are equal; None where their structure differs."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.op == b.op):
            return None
        if a.op != "get_attr":
            return True if other.get(a) is b else None
        return _same_tensor(str(a.target), str(b.target), here, there)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return None
        parts = [_equal(x, y, here, there, other) for x, y in zip(a, b, strict=True)]
        return None if None in parts else all(parts)
    return a == b if type(a) is type(b) else None


def _same_tensor(a: str, b: str, here: Program, there: Program) -> bool:
    if a == b and not a.startswith("constant."):
        return True  # a parameter of the one model
    first, second = here.tensors[a], there.tensors[b]
    return first.dtype == second.dtype and torch.equal(first, second)


@dataclass
class _Site:
    """A call of the packed program whose arguments change."""

    made: Program
    call: fx.Node
    region: fx.Node | None
    """The call of its region, or None."""
    here: Program
    there: Program
    sizes: tuple[str, str]

    def changed(self, packed: Any, before: Any, after: Any) -> Any:
        """The argument of the packed call at the other size.

        packed: at the first size. before, after: the laid-out call's at the first and at the other size.
        """
        if isinstance(before, fx.Node):
            constant = before.op == "get_attr"
            same = not constant or _same_tensor(str(before.target), str(after.target), self.here, self.there)
            return packed if same else self._constant(packed, str(before.target), str(after.target))
        if isinstance(before, list | tuple):
            if not isinstance(packed, list | tuple) or len(packed) != len(before):
                raise self._rewritten()
            return [self.changed(*three) for three in zip(packed, before, after, strict=True)]
        if before != after and packed != before:
            raise self._rewritten()
        return packed if before == after else after

    def _constant(self, packed: fx.Node, before: str, after: str) -> fx.Node:
        """Inserts a read of the other size's tensor, where ``packed`` reads the first size's."""
        outer, index = packed, 0
        if self.region is not None:
            inputs = [n for n in packed.graph.nodes if n.op == "placeholder"]
            index = inputs.index(packed)
            outer = operand(self.region, index)
        shared = self.region is not None and len(packed.users) > 1
        if shared or str(outer.target) not in (before, before + ":f16"):
            raise self._rewritten()
        graph, tensor = self.made.graph, self.there.tensors[after]
        stored = tensor.to(stored_dtype(after, tensor)).contiguous()
        first = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
        with graph.inserting_before(first):
            read = graph.get_attr(self.made.tensors.add(f"{after}@{self.sizes[1]}", stored))
        if self.region is None:
            return read
        self.region.update_arg(index, read)
        return packed

    def _rewritten(self) -> UserError:
        return _refusal(self.sizes, f"a pass rewrote an operand of '{self.call.name}', which depends on it")


def other_sizes(packed: Program, laid_out: Sequence[Program], options: Options) -> list[Specialization]:
    """Specializes the packed program to the sizes of ``--shapes`` behind the first.

    laid_out: the laid-out program at each size, the first included.
    """
    here, *there = laid_out
    return [
        Specialization(transplant(packed, here, other), batches)
        for other, batches in zip(there, [*parse_shapes(options.shapes).values()][1:], strict=True)
    ]
