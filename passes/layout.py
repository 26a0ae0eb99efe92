"""Rewrites the graph to channels-last activations and token-major attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import MOVEMENT, POINTWISE, aten, interior_permutes, is_movement, is_permute
from mpq_compiler.ir.canonicalize import respell
from mpq_compiler.ir.editor import Editor, bound
from mpq_compiler.ir.graph import arguments, copy_graph, merge_equal, operand, prune, weight_of
from mpq_compiler.ir.layout_algebra import ONE, Chain, Step, follow
from mpq_compiler.ir.program import Program, Stage
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError

TO_CHANNELS_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1)}
TO_CHANNELS_FIRST = {3: (0, 2, 1), 4: (0, 3, 1, 2)}
LOWEST = -1e30
"""The value that a boolean mask adds where it is false; it is finite, so that a row without any key is no NaN."""


@dataclass(frozen=True)
class Layout(Pass):
    """Rewrites images to [B, H, W, C] and attention operands to [B, T, heads*D]; permutes remain at the ends only.

    First what torch spells in several ways gets one spelling. Then three kinds of rules, until nothing changes: an
    operator becomes its channels-last form between two permutes; a permute sinks below operators that do not mind; a
    chain of data movement becomes the reshape and permute that it amounts to, or nothing.

        %conv_in                       = aten.conv2d(%sample, .weight, .bias, [1,1], [1,1])
        %down_blocks_0_resnets_0_norm1 = aten.group_norm(%conv_in, 8, .weight, .bias, 1e-05, false)
      =>
        %permute_default               = aten.permute(%sample, [0,2,3,1])
        %conv_in                       = mpq::conv2d(%permute_default, .weight:ohwi, .bias, ..., padding=[1,1,1,1])
        %down_blocks_0_resnets_0_norm1 = mpq::group_norm(%conv_in, .weight, .bias, groups=8, eps=1e-05)
    """

    contract: ClassVar[Contract] = Contract.REWRITE
    role: ClassVar[Role | None] = Role.REWRITES
    requires: ClassVar[frozenset[str]] = frozenset({"graph"})
    provides: ClassVar[frozenset[str]] = frozenset({"channels-last"})

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork(stage=Stage.REWRITTEN)
        edit = Editor(program)
        respell(edit)
        for node in list(program.graph.nodes):
            rule = CHANNELS_LAST.get(node.target) if node.op == "call_function" else None
            if rule is not None:
                with edit.before(node):
                    rule(edit, node)
        prune(program.graph)
        changed = True
        while changed:
            changed = simplify_movement(edit)
            changed |= sink_permutes(edit)
        spread_repeats(edit)
        fold_constants(edit)
        require_rows_of_samples(edit)
        merge_equal(program.graph)
        keep_names(program)
        for node in interior_permutes(program.graph):
            program.fallbacks[node.name] = "data is permuted between two kernels"
        return program


# --- operators between two permutes -------------------------------------------------------------------------


def _convolution(edit: Editor, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, groups = bound(node, None, None, None, (1, 1), (0, 0), (1, 1), 1)
    fallbacks = edit.program.fallbacks
    if not isinstance(padding, Sequence) or isinstance(padding, str) or any(d != 1 for d in dilation):
        fallbacks[node.name] = "convolution with dilation or named padding stays channels-first"
        return
    if weight.op != "get_attr":
        fallbacks[node.name] = "convolution whose weight is computed stays channels-first"
        return
    ph, pw = (padding[0], padding[-1])
    top, bottom, left, right = ph, ph, pw, pw
    if (before := _zero_padding(x)) is not None:
        left, right, top, bottom = left + before[0], right + before[1], top + before[2], bottom + before[3]
        x = operand(x, 0)
    name = str(weight.target)
    last = edit.stored(name + ":ohwi", edit.program.tensors[name].permute(0, 2, 3, 1))
    image = edit.permuted(x, TO_CHANNELS_LAST[4])
    spatial = ([stride[0], stride[-1]], [top, bottom, left, right])
    new = edit.call(ops.conv2d, image, last, bias, *spatial, groups)
    edit.replace(node, new, edit.permuted(new, TO_CHANNELS_FIRST[4]))


PADS = (aten.pad.default, aten.constant_pad_nd.default)


def _padding(node: fx.Node) -> tuple[list[int], float] | None:
    """The amounts of a constant padding, innermost dimension first, and its value; None for other calls."""
    if node.target not in PADS:
        return None
    pad, *rest = arguments(node)[1:]
    mode = rest[0] if rest and isinstance(rest[0], str) else node.kwargs.get("mode", "constant")
    value: Any = next((r for r in rest if isinstance(r, int | float)), node.kwargs.get("value")) or 0
    return (list(pad), value) if mode == "constant" and isinstance(pad, Sequence) else None


def _zero_padding(node: fx.Node) -> list[int] | None:
    pad, value = _padding(node) or ([], 1)
    return pad if value == 0 and len(pad) == 4 and min(pad) >= 0 else None


def _group_norm(edit: Editor, node: fx.Node) -> None:
    x, groups, weight, bias, eps = bound(node, None, None, None, None, 1e-5)
    rank = edit.rank(node)
    if rank not in TO_CHANNELS_LAST:
        edit.program.fallbacks[node.name] = f"group_norm of {rank} dimensions has no channels-last form"
        return
    new = edit.call(ops.group_norm, edit.permuted(x, TO_CHANNELS_LAST[rank]), groups, weight, bias, eps)
    edit.replace(node, new, edit.permuted(new, TO_CHANNELS_FIRST[rank]))


def _upsample(edit: Editor, node: fx.Node) -> None:
    x = operand(node, 0)
    before, after = edit.value(x).shape, edit.value(node).shape
    factors = [after[2] // before[2], after[3] // before[3]]
    if (before[2] * factors[0], before[3] * factors[1]) != (after[2], after[3]):
        edit.program.fallbacks[node.name] = "upsampling by a fraction has no kernel"
        return
    new = edit.call(ops.upsample_nearest2d, edit.permuted(x, TO_CHANNELS_LAST[4]), factors)
    edit.replace(node, new, edit.permuted(new, TO_CHANNELS_FIRST[4]))


def _attention(edit: Editor, node: fx.Node) -> None:
    q, k, v, mask, _, causal = bound(node, None, None, None, None, 0.0, False)
    if edit.rank(node) != 4:
        edit.program.fallbacks[node.name] = f"attention of {edit.rank(node)} dimensions has no kernel"
        return
    if node.kwargs.get("enable_gqa"):
        k, v = (_heads(edit, x, edit.size(q)[1][0]) for x in (k, v))
    if causal:
        queries, keys = (edit.size(x)[2][0] for x in (q, k))
        later = torch.full((queries, keys), LOWEST).triu(1)
        mask = edit.stored(f"constant.causal_{queries}_{keys}", later)
    if mask is not None and (mask := _additive(edit, mask)) is None:
        edit.program.fallbacks[node.name] = "attention with a mask of this form has no kernel"
        return
    _, heads, tokens, dim = (size[0] for size in edit.size(node))
    rows = []
    for x in (q, k, v):
        _, _, length, width = (size[0] for size in edit.size(x))
        major = edit.permuted(x, (0, 2, 1, 3))
        rows.append(edit.call(aten.reshape.default, major, [-1, length, heads * width]))
    new = edit.call(ops.attention, *rows, heads, node.kwargs.get("scale"), mask)
    split = edit.call(aten.reshape.default, new, [-1, tokens, heads, dim])
    edit.replace(node, new, edit.permuted(split, (0, 2, 1, 3)))


def _heads(edit: Editor, x: fx.Node, heads: int) -> fx.Node:
    """Repeats each head of keys or values [B, H, T, D] for the queries that share it."""
    _, own, length, width = (size[0] for size in edit.size(x))
    if own == heads:
        return x
    each = edit.call(aten.unsqueeze.default, x, 2)
    repeated = edit.call(aten.expand.default, each, [-1, own, heads // own, length, width])
    return edit.call(aten.reshape.default, repeated, [-1, heads, length, width])


REPEATS = {aten.repeat_interleave.self_int, aten.expand.default}


def _additive(edit: Editor, mask: fx.Node) -> fx.Node | None:
    """Converts a mask to an additive tensor of rank 4, not repeated over heads or queries; None where it cannot."""
    calls = [mask]
    while calls[-1].target in MOVEMENT | REPEATS:
        calls.append(operand(calls[-1], 0))
    source = calls.pop()
    chain = Chain(edit.size(source))
    if not all(follow(chain, call, edit.size(call)) for call in reversed(calls)) or not chain.without_repeats():
        return None
    chain.reshape((ONE,) * (4 - len(chain.dims)) + chain.shape())
    moved = _made(edit, source, chain.steps())
    if edit.value(moved).dtype != torch.bool:
        return moved
    kept = edit.stored("constant.mask_kept", torch.tensor(0.0))
    return edit.call(aten.where.self, moved, kept, edit.stored("constant.mask_dropped", torch.tensor(LOWEST)))


CHANNELS_LAST: dict[Any, Callable[[Editor, fx.Node], None]] = {
    aten.conv2d.default: _convolution,
    aten.group_norm.default: _group_norm,
    aten.upsample_nearest2d.vec: _upsample,
    aten.scaled_dot_product_attention.default: _attention,
}


# --- permutes sink ------------------------------------------------------------------------------------------


def sink_permutes(edit: Editor) -> bool:
    """Rewrites ``f(permute(x))`` to ``permute(f(x))`` for every f that has a rule; True if a permute moved."""
    changed = False
    for node in list(edit.graph.nodes):
        rule = SINKS.get(node.target) if node.op == "call_function" else None
        if rule is None or not any(is_permute(n) for n in node.all_input_nodes):
            continue
        with edit.before(node):
            if (sunk := rule(edit, node)) is not None:
                edit.replace(node, sunk[0], edit.permuted(*sunk))
                changed = True
    prune(edit.graph)
    return changed


Sunk = tuple[fx.Node, Sequence[int]] | None
"""A call on unpermuted operands, and the order that permutes its result; None where a permute stays."""


def _order(node: fx.Node) -> list[int]:
    return [int(d) for d in arguments(node)[1]]


def _pointwise(edit: Editor, node: fx.Node) -> Sunk:
    return _together(edit, node, [a for a in node.args if isinstance(a, fx.Node)], lambda moved, order: edit.call(
        node.target, *(moved.get(a, a) for a in node.args), **node.kwargs
    ))


def _concatenation(edit: Editor, node: fx.Node) -> Sunk:
    parts, dim = bound(node, None, 0)
    dim %= edit.rank(node)
    return _together(edit, node, parts, lambda moved, order: edit.call(
        aten.cat.default, [moved[a] for a in parts], order[dim]
    ))


def _together(
    edit: Editor, node: fx.Node, operands: Sequence[fx.Node], make: Callable[[dict[Any, fx.Node], list[int]], fx.Node]
) -> Sunk:
    """Removes a permute that one of several operands is; None where another one would then need a permute.

    ``make`` makes the call of the unpermuted operands and the permute's order.
    """
    rank = edit.rank(node)
    source = next(a for a in operands if is_permute(a))
    lead = rank - edit.rank(source)
    order = [*range(lead), *(lead + d for d in _order(source))]
    inverse = [order.index(d) for d in range(rank)]
    if not all(a is source or _free(edit, a, order, inverse) for a in operands):
        return None
    return make({a: _unpermuted(edit, a, order, inverse) for a in operands}, order), order


def _free(edit: Editor, x: fx.Node, order: list[int], inverse: list[int]) -> bool:
    """Whether undoing another operand's permute on this one costs nothing at run time."""
    if edit.rank(x) == 0 or (is_permute(x) and _order(x) == order):
        return True
    size = (ONE,) * (len(order) - edit.rank(x)) + edit.size(x)
    if (kept := [d for d in inverse if size[d] != ONE]) == sorted(kept):
        return True
    while is_movement(x):
        x = operand(x, 0)
    return x.op in ("placeholder", "get_attr")


def _unpermuted(edit: Editor, x: fx.Node, order: list[int], inverse: list[int]) -> fx.Node:
    if is_permute(x) and _order(x) == order:
        return operand(x, 0)
    if edit.rank(x) == 0:
        return x
    for _ in range(len(order) - edit.rank(x)):
        x = edit.call(aten.unsqueeze.default, x, 0)
    return edit.permuted(x, inverse)


def _slice(edit: Editor, node: fx.Node) -> Sunk:
    source, dim, *rest = arguments(node)
    order = _order(source)
    return edit.call(aten.slice.Tensor, operand(source, 0), order[int(dim) % len(order)], *rest), order


def _select(edit: Editor, node: fx.Node) -> Sunk:
    source, dim, index = arguments(node)
    order = _order(source)
    gone = order.pop(int(dim) % len(order))
    return edit.call(aten.select.int, operand(source, 0), gone, index), [d - (d > gone) for d in order]


def _mean(edit: Editor, node: fx.Node) -> Sunk:
    source, dims, keep = bound(node, None, None, False)
    if dims is None or not keep:
        return None
    order = _order(source)
    return edit.call(aten.mean.dim, operand(source, 0), [order[d] for d in dims], True), order


def _of_last_dimension(edit: Editor, node: fx.Node) -> Sunk:
    """Sinks a permute below an operator that treats each row by itself."""
    source = node.args[0]
    if not is_permute(source) or (order := _order(source))[-1] != len(order) - 1:  # type: ignore[arg-type]
        return None
    if node.target is aten.layer_norm.default and len(arguments(node)[1]) != 1:
        return None
    return edit.call(node.target, operand(source, 0), *node.args[1:], **node.kwargs), order  # type: ignore[arg-type]


def _pad(edit: Editor, node: fx.Node) -> Sunk:
    source, padding = operand(node, 0), _padding(node)
    if padding is None:
        return None
    order, (pad, value) = _order(source), padding
    rank = len(order)
    own = {rank - 1 - i: pad[2 * i : 2 * i + 2] for i in range(len(pad) // 2)}
    moved = {order[d]: amount for d, amount in own.items() if any(amount)}
    flat = [n for d in range(rank - 1, min(moved, default=rank) - 1, -1) for n in moved.get(d, [0, 0])]
    return edit.call(aten.constant_pad_nd.default, operand(source, 0), flat, value), order


def _matmul(edit: Editor, node: fx.Node) -> Sunk:
    """Rewrites a matrix product of permuted operands to an einsum of the unpermuted ones.

    The result keeps the order in which the operands have its dimensions, which leaves tokens in front of heads.
    """
    rank = edit.rank(node)
    left, right = operand(node, 0), operand(node, 1)
    if rank < 3 or edit.size(left)[:-2] != edit.size(right)[:-2]:
        return None
    batch = "bhgf"[: rank - 2]
    letters, result = (batch + "mk", batch + "kn"), batch + "mn"
    sources, spelled = [], []
    for x, own in zip((left, right), letters, strict=True):
        order = _order(x) if is_permute(x) else range(rank)
        sources.append(operand(x, 0) if is_permute(x) else x)
        spelled.append("".join(own[list(order).index(d)] for d in range(rank)))
    merged = _merged([word.replace("k", "") for word in spelled], result)
    new = edit.call(aten.einsum.default, f"{','.join(spelled)}->{merged}", sources)
    return new, [merged.index(letter) for letter in result]


def _merged(words: Sequence[str], otherwise: str) -> str:
    """Orders the letters consistently with every word; `otherwise` breaks ties, and is the order where none agrees."""
    left, found = otherwise, ""
    while left:
        first = next((c for c in left if all(not set(w[: w.index(c)]) & set(left) for w in words if c in w)), None)
        if first is None:
            return otherwise
        left, found = left.replace(first, ""), found + first
    return found


SINKS: dict[Any, Callable[[Editor, fx.Node], Sunk]] = {
    **{target: _pointwise for target in (*POINTWISE, aten.where.self)},
    aten.cat.default: _concatenation,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.mean.dim: _mean,
    aten.linear.default: _of_last_dimension,
    aten.layer_norm.default: _of_last_dimension,
    ops.rms_norm: _of_last_dimension,
    **{target: _pad for target in PADS},
    aten.matmul.default: _matmul,
}


# --- data movement ------------------------------------------------------------------------------------------


def simplify_movement(edit: Editor) -> bool:
    """Reduces each chain of data movement to the steps that it amounts to; True if the graph changed."""
    changed = False
    for node in list(edit.graph.nodes):
        if not is_movement(node) or all(is_movement(u) for u in node.users):
            continue
        calls = [node]
        while is_movement(source := operand(calls[-1], 0)):
            calls.append(source)
        calls.reverse()
        chain = Chain(edit.size(source))
        if not all(follow(chain, call, edit.size(call)) for call in calls):
            continue
        steps = chain.steps()
        if [(call.target, call.args[1:]) for call in calls] == [(target, (argument,)) for target, argument in steps]:
            continue
        with edit.before(node):
            node.replace_all_uses_with(_made(edit, source, steps))
        changed = True
    prune(edit.graph)
    return changed


def _made(edit: Editor, source: fx.Node, steps: Sequence[Step]) -> fx.Node:
    for target, argument in steps:
        source = edit.call(target, source, argument)
    return source


def spread_repeats(edit: Editor) -> None:
    """Rewrites what repeats along dimensions to expansions, which readers of strides need not copy."""
    for node in list(edit.graph.nodes):
        if node.target is aten.repeat_interleave.self_int:
            x, times, dim = bound(node, None, None, 0)
            with edit.before(node):
                edit.replace(node, _spread(edit, x, dim % edit.rank(x), times, behind=1))
        elif node.target is aten.repeat.default:
            x, counts = operand(node, 0), list(arguments(node)[1])
            with edit.before(node):
                made = x
                if lacking := len(counts) - edit.rank(x):
                    made = edit.call(aten.reshape.default, x, [1] * lacking + _written(edit.size(x)))
                for dim, times in enumerate(counts):
                    made = made if times == 1 else _spread(edit, made, dim, int(times), behind=0)
                edit.replace(node, made)


def _spread(edit: Editor, x: fx.Node, dim: int, times: int, behind: int) -> fx.Node:
    """The tensor so many times along a dimension: each element, or (``behind`` 0) all of them."""
    each = edit.call(aten.unsqueeze.default, x, dim + behind)
    written = _written(edit.size(x))
    size = -1 if written[dim] == -1 else written[dim] * times
    repeated = edit.call(aten.expand.default, each, [*written[: dim + behind], times, *written[dim + behind :]])
    return edit.call(aten.reshape.default, repeated, [*written[:dim], size, *written[dim + 1 :]])


def _written(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Sizes as arguments, -1 for that which grows with the batch."""
    return [size[0] if size[0] == size[1] else -1 for size in sizes]


def fold_constants(edit: Editor) -> None:
    """Folds the movement of stored tensors into the store."""
    for node in list(edit.graph.nodes):
        source = node.args[0] if is_movement(node) else None
        if isinstance(source, fx.Node) and source.op == "get_attr":
            tensors, name = edit.program.tensors, str(source.target)
            moved = node.target(tensors[name], *node.args[1:]).contiguous()
            with edit.before(node):
                node.replace_all_uses_with(edit.stored(name if ":" in name else name + ":moved", moved))
    prune(edit.graph)


def require_rows_of_samples(edit: Editor) -> None:
    """Raises a UserError where a layer reads rows that are not sample by sample, since time groups are per sample."""
    for node in edit.program.quantizable:
        x = operand(node, 0)
        while is_movement(x):
            chain = Chain(edit.size(operand(x, 0)))
            if follow(chain, x, edit.size(x)) and not chain.leads_with_batch():
                raise UserError(
                    f"layer '{weight_of(node)}' of {edit.program.model} multiplies rows of several samples in turn "
                    f"(%{x.name} puts {list(edit.value(x).shape)} in front of the batch), which is not supported"
                )
            x = operand(x, 0)


# --- names --------------------------------------------------------------------------------------------------


def keep_names(program: Program) -> None:
    """Gives every rewritten call the name of the call that it replaces."""
    taken = {n.name for n in program.graph.nodes}
    for node in program.graph.nodes:
        origin = node.meta.pop("origin", None)
        if origin and origin not in taken:
            taken.discard(node.name)
            node.name = origin
            taken.add(origin)
    program.graph = copy_graph(program.graph)
