"""Graphs of one sample made graphs of a batch.

A model's code may loop over samples, or take their number for a constant. Traced with one sample such a model is a
graph like any other, and what each call of it means for a batch is known by its operator:

    %flat = aten.view(%x, [16, 64])                 # x [1, 16, 8, 8], one sample
    %cat  = aten.cat([%flat, %ids], 1)              # ids [16, 3], the same for all samples
  =>
    %flat = aten.reshape(%x, [-1, 16, 64])          # x [B, 16, 8, 8]
    %each = mpq.for_each_sample(%ids[None], %x)
    %cat  = aten.cat([%flat, %each], 2)

The batch stands for a dimension of size 1 as long as there is one, and is a further first dimension elsewhere.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import arguments, function_of, operand

Operand = Any
"""An argument of a call, with a `Value` where the call of the given graph has a node: a value, a number, or a list."""
Operands = Sequence[Operand]
Named = dict[str, Operand]
Rule = Callable[[Operands, Named], Operand]
Target = Callable[..., Operand]

BATCH = 61
"""The batch in the shapes that nodes are marked with: no model has such a size."""

RESHAPES: set[Target] = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
    *(aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default),
    *(aten.view_as.default, aten.expand_as.default),
}
SAME: set[Target] = {
    *(aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default),
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.dropout.default),
    *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther),
    *(aten.where.ScalarSelf, aten.where.Scalar, aten.nan_to_num.default, aten.silu.default, aten.glu.default),
    *(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.__and__.Scalar, aten.__or__.Scalar),
}
"""Operators that are pointwise besides those that torch marks as such."""
ALONG: dict[Target, int] = {
    **dict.fromkeys([aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default], 1),
    **dict.fromkeys([aten.softmax.int, aten.log_softmax.int, aten.cumsum.default, aten.any.dim, aten.all.dim], 1),
    **dict.fromkeys([aten.flip.default, aten.prod.dim_int, aten.var.correction, aten.any.dims], 1),
    **dict.fromkeys([aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim], 2),
    **dict.fromkeys([aten.slice.Tensor, aten.narrow.default, aten.index_select.default], 1),
    **dict.fromkeys([aten.repeat_interleave.self_int, aten.roll.default], 2),
}
"""Operators of one tensor along dimensions, and which of their arguments names these."""
WHOLE: dict[Target, Target] = {aten.mean.default: aten.mean.dim, aten.sum.default: aten.sum.dim_IntList}
PARTS: dict[Target, int] = {
    **dict.fromkeys([aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes], 2),
    **{aten.unbind.int: 1, aten.tensor_split.sections: 2},
}
"""Operators that take a tensor apart along a dimension, and which of their arguments names it."""
OF_SAMPLES: set[Target] = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding),
    *(aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.group_norm.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.pixel_shuffle.default),
    *(aten.adaptive_avg_pool2d.default, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
    *(aten.upsample_nearest1d.vec, aten.upsample_bilinear2d.vec, aten.pixel_unshuffle.default),
}
"""Operators whose first dimension is one of samples."""
OF_ROWS: set[Target] = {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default}
"""Operators of the last dimensions."""
FILLED: dict[Target, int | None] = {
    **dict.fromkeys(
        [aten.new_zeros.default, aten.zeros_like.default, aten.new_empty.default, aten.empty_like.default], 0
    ),
    **dict.fromkeys([aten.new_ones.default, aten.ones_like.default], 1),
    **{aten.new_full.default: None, aten.full_like.default: None},
}
"""Operators that make a tensor of one value, and that value; None: their last positional argument."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph of a batch."""

    node: fx.Node
    shape: tuple[int, ...]
    """Its shape in the graph of one sample."""
    at: int | None = None
    """The dimension of the batch; None: it is the same for all samples."""
    further: bool = False
    """Whether the batch is a dimension that `shape` has not; else it stands for one of size 1."""


def with_batch(graph: fx.Graph) -> fx.Graph:
    """The graph for inputs [B, ...] and an output [B, ...], of one for inputs [1, ...] whose shapes are in its meta.

    Samples do not see each other in it, whatever the model's code would make of a batch.

    ValueError: an operator that has no rule here, in words that name it.
    """
    return _Batching().of(graph)


class _Batching:
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Operand] = {}
        self.like: fx.Node | None = None
        """An input, whose rows are counted."""
        self.origin: fx.Node
        """The call of the given graph that is at hand."""

    def of(self, graph: fx.Graph) -> fx.Graph:
        for node in graph.nodes:
            self.origin = node
            if node.op == "output":
                (output,) = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
                self.graph.output(self._unit(self.values[output]).node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            else:
                made = self.graph.node_copy(node)
                made.meta = _on_meta(node.meta)
                shape = tuple(node.meta["val"].shape)
                self.values[node] = Value(made, shape)
                if node.op == "placeholder":
                    self.like = self.like or made
                    self.values[node] = self._marked(Value(made, shape, 0))
        return self.graph

    def _call(self, node: fx.Node) -> Operand:
        args: Operands = fx.map_arg(node.args, self.values.__getitem__)
        kwargs: Named = fx.map_arg(node.kwargs, self.values.__getitem__)
        if not any(v.at is not None for v in _values([args, kwargs])):
            return self._same_for_all(node, args, kwargs)
        target = function_of(node)
        if target is operator.getitem:
            return args[0][args[1]]
        if target in FILLED:
            value = FILLED[target]
            return self._filled(args[-1] if value is None else value)
        rule = self._rule(target)
        return rule(args, kwargs)

    def _rule(self, target: Target) -> Rule:
        for known, rule in (
            (RESHAPES, self._reshape),
            (OF_ROWS, self._of_rows),
            (OF_SAMPLES, self._of_samples),
            (ALONG, self._along),
            (WHOLE, self._whole),
            (PARTS, self._parts),
            (SAME, self._pointwise),
        ):
            if target in known:
                return rule
        if torch.Tag.pointwise in getattr(target, "tags", ()):
            return self._pointwise
        found = _RULES.get(target)
        if found is None:
            raise ValueError(f"there is no rule for a batch of {getattr(target, '__name__', target)}")
        return functools.partial(found, self)

    # --- making calls -----------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the call's result in the graph of one sample."""
        return tuple(self.origin.meta["val"].shape)

    def _marked(self, value: Value, dtype: torch.dtype | None = None) -> Value:
        sizes = list(value.shape)
        if value.at is not None:
            sizes[value.at : value.at + (not value.further)] = [BATCH]
        dtype = dtype or self.origin.meta["val"].dtype
        value.node.meta = {**self.origin.meta, "val": torch.empty(sizes, dtype=dtype, device="meta")}
        return value

    def _emit(
        self, target: Target, args: Operands, kwargs: Named, like: Value | None, shape: Sequence[int] | None = None
    ) -> Value:
        """A call whose result has its batch where ``like`` has it; None: a result that is the same for all samples."""
        call = self.graph.call_function(target, tuple(_nodes(args)), _nodes(kwargs))
        made = Value(call, tuple(self.shape if shape is None else shape))
        if like is not None:
            made = Value(made.node, made.shape, like.at, like.further)
        return self._marked(made)

    def _same_for_all(self, node: fx.Node, args: Operands, kwargs: Named) -> Value:
        if node.target is operator.getitem and isinstance(args[0], list):
            part: Value = args[0][args[1]]
            return part
        if node.target is aten.expand.default:  # sizes of its own, none that is left to the operand
            args = (args[0], list(self.shape))
        made = self.graph.call_function(function_of(node), _nodes(args), _nodes(kwargs))
        made.meta = _on_meta(node.meta)
        value = node.meta.get("val")
        return Value(made, tuple(value.shape) if isinstance(value, Tensor) else ())

    def _filled(self, value: Operand) -> Value:
        return self._emit(aten.full.default, (list(self.shape), value), {"dtype": self.origin.meta["val"].dtype}, None)

    def _reshaped(self, value: Value, sizes: Sequence[int], at: int, further: bool, shape: Sequence[int]) -> Value:
        """The elements in another shape; ``sizes`` is the result's, with -1 for the batch."""
        if list(value.node.meta["val"].shape) == [BATCH if size == -1 else size for size in sizes]:
            return Value(value.node, tuple(shape), at, further)
        made = self.graph.call_function(aten.reshape.default, (value.node, list(sizes)))
        return self._marked(Value(made, tuple(shape), at, further), value.node.meta["val"].dtype)

    def _permuted(self, value: Value, order: Sequence[int]) -> fx.Node:
        if list(order) == sorted(order):
            return value.node
        made = self.graph.call_function(aten.permute.default, (value.node, list(order)))
        seen = value.node.meta["val"]
        made.meta = {
            **self.origin.meta,
            "val": torch.empty([seen.shape[i] for i in order], dtype=seen.dtype, device="meta"),
        }
        return made

    # --- where the batch is -----------------------------------------------------------------------------------

    def _leading(self, value: Value, rank: int | None = None) -> Value:
        """The value with the batch as a further first dimension, and with ones behind it up to a rank."""
        if value.at is None:
            return value
        shape = (1,) * ((rank or 0) - len(value.shape)) + value.shape
        if not value.further and value.at:
            others = (i for i in range(len(value.shape)) if i != value.at)
            value = Value(self._permuted(value, [value.at, *others]), value.shape, 0)
        return self._reshaped(value, [-1, *shape], 0, True, shape)

    def _further(self, value: Value) -> Value:
        """The value with the batch as a further first dimension, whatever it is."""
        return self._leading(value if value.at is not None else self._each(value))

    def _unit(self, value: Value) -> Value:
        """The value with the batch in place of its first dimension, which has size 1."""
        if value.at is None:
            return self._each(value)
        if value.at == 0 and not value.further:
            return value
        if value.shape[:1] != (1,):
            raise ValueError(f"{self.origin.name} has no dimension for the batch")
        value = self._leading(value)
        return self._reshaped(value, [-1, *value.shape[1:]], 0, False, value.shape)

    def _each(self, value: Value) -> Value:
        """The value, the same for all samples, once for each of them."""
        shape = value.shape
        made = value.node
        if shape[:1] != (1,):
            made = self.graph.call_function(aten.reshape.default, (made, [1, *shape]))
            dtype = value.node.meta["val"].dtype
            made.meta = {**self.origin.meta, "val": torch.empty([1, *shape], dtype=dtype, device="meta")}
        made = self.graph.call_function(ops.for_each_sample, (made, self.like))
        return self._marked(Value(made, shape, 0, shape[:1] != (1,)), value.node.meta["val"].dtype)

    def _aligned(self, values: list[Value]) -> tuple[list[Value], Value]:
        """The operands of a call that broadcasts them, and one whose batch is where that of the result is."""
        rank = len(self.shape)
        batched = [v for v in values if v.at is not None]
        places = {v.at - len(v.shape) for v in batched if v.at is not None and not v.further}
        if len(places) == 1 and not any(v.further for v in batched):
            (place,) = places
            if all(v.at is not None or len(v.shape) < -place or v.shape[place] == 1 for v in values):
                return values, Value(batched[0].node, self.shape, rank + place)
        values = [self._leading(v, rank) for v in values]
        return values, Value(values[0].node, self.shape, 0, True)

    def _joined(self, values: list[Value], dim: int) -> tuple[list[Value], Value, int]:
        """The operands of a call that joins them along a dimension, one like its result, and that dimension in it."""
        batched = [v for v in values if v.at is not None]
        if all(v.at == 0 and not v.further for v in batched) and dim and all(v.shape[:1] == (1,) for v in values):
            return [v if v.at is not None else self._each(v) for v in values], batched[0], dim
        values = [self._further(v) for v in values]
        return values, values[0], dim + 1

    # --- rules ------------------------------------------------------------------------------------------------

    def _pointwise(self, args: Operands, kwargs: Named) -> Value:
        own = _values([args, kwargs])
        target = function_of(self.origin)
        if target is aten.glu.default:
            return self._emit(target, (self._leading(args[0]), -1), {}, self._leading(args[0]))
        if target is aten.type_as.default or target is aten.to.other:
            like = args[0] if args[0].at is not None else None
            return self._emit(aten.to.dtype, (args[0], self.origin.meta["val"].dtype), {}, like)
        values, like = self._aligned(own)
        swap = dict(zip(map(id, own), values, strict=True))

        def replaced(value: Value) -> Value:
            return swap[id(value)]

        return self._emit(target, _mapped([*args], replaced), _mapped(kwargs, replaced), like)

    def _reshape(self, args: Operands, kwargs: Named) -> Value:
        value, shape = args[0], self.shape
        if self.origin.target is aten.expand_as.default:
            return self._expand((value, list(shape)), {})
        if not value.further:
            before = math.prod(value.shape[: value.at])
            places = [i for i, size in enumerate(shape) if size == 1 and math.prod(shape[:i]) == before]
            if places:
                at = value.at if value.at in places else places[0]
                return self._reshaped(value, [*shape[:at], -1, *shape[at + 1 :]], at, False, shape)
        value = self._leading(value)
        if shape[:1] == (1,):
            return self._reshaped(value, [-1, *shape[1:]], 0, False, shape)
        return self._reshaped(value, [-1, *shape], 0, True, shape)

    def _permute(self, args: Operands, kwargs: Named) -> Value:
        value, rank = args[0], len(self.shape)
        order = list(range(rank))
        if self.origin.target is aten.permute.default:
            order = [d % rank for d in args[1]]
        else:
            a, b = (0, 1) if self.origin.target is aten.t.default else (args[1] % rank, args[2] % rank)
            order[a], order[b] = order[b], order[a]
        return self._in_order(value, order)

    def _in_order(self, value: Value, order: Sequence[int]) -> Value:
        if value.further:
            return self._marked(Value(self._permuted(value, [0, *(d + 1 for d in order)]), self.shape, 0, True))
        return self._marked(Value(self._permuted(value, order), self.shape, order.index(value.at)))

    def _of_rows(self, args: Operands, kwargs: Named) -> Value:
        value, *others = args
        if any(v.at is not None for v in _values([others, kwargs])):
            raise ValueError(f"a weight of {self.origin.name} differs between samples")
        width = 1 if self.origin.target is aten.linear.default else len(others[0])
        if not value.further and value.at >= len(value.shape) - width:
            value = self._leading(value)
        return self._emit(function_of(self.origin), (value, *others), kwargs, value)

    def _of_samples(self, args: Operands, kwargs: Named) -> Value:
        value, *others = args
        target = function_of(self.origin)
        spatial = (
            len(args[1].shape) - 1 if len(args) > 1 and isinstance(args[1], Value) and "conv" in str(target) else 0
        )
        if spatial and len(value.shape) == spatial:  # without a batch of its own
            value = self._leading(value)
            return self._emit(target, (value, *others), kwargs, value)
        return self._by_samples(value, others, kwargs)

    def _by_samples(self, value: Value, others: Operands, kwargs: Named) -> Value:
        """A call whose first dimension is one of samples: of the batch, or of the batch and those that there are."""
        target = function_of(self.origin)
        if value.shape[0] == 1:
            value = self._unit(value)
            return self._emit(target, (value, *others), kwargs, value)
        shape = (1, *self.shape[1:])
        return self._parted(self._emit(target, (self._merged(value), *others), kwargs, Value(value.node, (), 0), shape))

    def _merged(self, value: Value) -> Value:
        """The value with the batch and its first dimension as one."""
        value = self._further(value)
        made = self._reshaped(value, [-1, *value.shape[1:]], 0, False, (1, *value.shape[1:]))
        return self._of_many(made, value.shape[0])

    def _parted(self, value: Value) -> Value:
        """The inverse of `_merged`, for a result of the call at hand."""
        return self._reshaped(self._of_many(value, self.shape[0]), [-1, *self.shape], 0, True, self.shape)

    def _of_many(self, value: Value, rows: int) -> Value:
        seen = value.node.meta["val"]
        sizes = [BATCH * rows, *seen.shape[1:]]
        value.node.meta["val"] = torch.empty(sizes, dtype=seen.dtype, device="meta")
        return value

    def _along(self, args: Operands, kwargs: Named) -> Value:
        value, index, target = args[0], ALONG[function_of(self.origin)], function_of(self.origin)
        names = [a.name for a in target._schema.arguments]  # type: ignore[attr-defined]
        args, kwargs, rank = [*args], dict(kwargs), len(value.shape)
        while len(args) <= index:
            args.append(kwargs.pop(names[len(args)], 0 if target is aten.slice.Tensor else None))
        given = range(rank) if args[index] is None else args[index]
        if args[index] is None and target in (aten.repeat_interleave.self_int, aten.roll.default):
            if rank != 1:
                raise ValueError(f"{self.origin.name} takes all dimensions for one")
            given = 0
        dims = [d % rank for d in ([given] if isinstance(given, int) else given)]
        if not value.further and value.at in dims:
            if target in (aten.slice.Tensor, aten.narrow.default, aten.flip.default) and self.shape == value.shape:
                return Value(value.node, value.shape, value.at)
            value = self._leading(value)
        if value.further:
            dims = [d + 1 for d in dims]
        gone = 0 if len(self.shape) == rank else sum(d < value.at for d in dims)
        args = [value, *args[1:]]
        args[index] = dims[0] if isinstance(given, int) else dims
        return self._emit(target, args, kwargs, Value(value.node, self.shape, value.at - gone, value.further))

    def _whole(self, args: Operands, kwargs: Named) -> Value:
        value = self._leading(args[0])
        dims = [d + 1 for d in range(len(value.shape))]
        return self._emit(WHOLE[function_of(self.origin)], (value, dims), kwargs, value)

    def _select(self, args: Operands, kwargs: Named) -> Value:
        value, dim, index = args[0], args[1] % len(args[0].shape), args[2]
        if not value.further and dim == value.at:
            whole = self._leading(value)
            return self._reshaped(whole, [-1, *self.shape], 0, True, self.shape)
        at = value.at - (not value.further and dim < value.at)
        like = Value(value.node, self.shape, at, value.further)
        return self._emit(aten.select.int, (value, dim + value.further, index), {}, like)

    def _parts(self, args: Operands, kwargs: Named) -> list[Value]:
        target = function_of(self.origin)
        index, names = PARTS[target], [a.name for a in target._schema.arguments]  # type: ignore[attr-defined]
        args, kwargs = [*args], dict(kwargs)
        while len(args) <= index:
            args.append(kwargs.pop(names[len(args)], 0))
        value, results = args[0], self.origin.meta["val"]
        dim = args[index] % len(value.shape)
        if not value.further and dim == value.at:
            if target is aten.unbind.int:
                whole = self._leading(value)
                shape = tuple(results[0].shape)
                return [self._reshaped(whole, [-1, *shape], 0, True, shape)]
            return [value]
        args[0], args[index] = value.node, dim + value.further
        made = self.graph.call_function(target, tuple(args), kwargs)
        made.meta = {**self.origin.meta, "val": None}
        at = value.at - (target is aten.unbind.int and not value.further and dim < value.at)
        parts = []
        for i, result in enumerate(results):
            part = self.graph.call_function(operator.getitem, (made, i))
            parts.append(self._marked(Value(part, tuple(result.shape), at, value.further), result.dtype))
        made.meta["val"] = tuple(part.node.meta["val"] for part in parts)
        return parts

    def _cat(self, args: Operands, kwargs: Named) -> Value:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        values = [v for v in args[0] if v.shape != (0,)]
        values, like, dim = self._joined(values, dim % len(self.shape))
        return self._emit(aten.cat.default, (values, dim), {}, like)

    def _stack(self, args: Operands, kwargs: Named) -> Value:
        values, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(self.shape)
        return self._stacked(values, dim)

    def _stacked(self, values: list[Value], dim: int) -> Value:
        if len(values) == 1:
            whole = self._leading(values[0])
            if dim == 0:
                return self._reshaped(whole, [-1, *whole.shape], 0, False, self.shape)
            return self._reshaped(whole, [-1, *self.shape], 0, True, self.shape)
        values, like, at = self._joined(values, dim)
        if like.further:
            return self._emit(aten.stack.default, (values, at), {}, like)
        return self._emit(aten.stack.default, (values, at), {}, Value(like.node, self.shape, 0))

    def _pad_sequence(self, args: Operands, kwargs: Named) -> Value:
        first = args[1] if len(args) > 1 else kwargs.get("batch_first", False)
        if len({v.shape for v in args[0]}) != 1:
            raise ValueError(f"{self.origin.name} pads tensors of several lengths")
        return self._stacked(args[0], 0 if first else 1)

    def _expand(self, args: Operands, kwargs: Named) -> Value:
        value, shape = args[0], self.shape
        place = None if value.further else value.at - len(value.shape) + len(shape)
        if place is None or shape[place] != 1:
            value = self._leading(value, len(shape))
            return self._emit(aten.expand.default, (value, [-1, *shape]), {}, value)
        if place:
            lacking = len(shape) - len(value.shape)
            full = (1,) * lacking + value.shape
            value = self._reshaped(value, [*full[:place], -1, *full[place + 1 :]], place, False, full)
        like = Value(value.node, shape, place)
        return self._emit(aten.expand.default, (value, [*shape[:place], -1, *shape[place + 1 :]]), {}, like)

    def _repeat(self, args: Operands, kwargs: Named) -> Value:
        value, times = args[0], list(args[1])
        lacking = len(times) - len(value.shape)
        if not value.further and not lacking and times[value.at] == 1:
            return self._emit(aten.repeat.default, (value, times), {}, value)
        value = self._leading(value, len(times))
        return self._emit(aten.repeat.default, (value, [1, *times]), {}, value)

    def _pad(self, args: Operands, kwargs: Named) -> Value:
        value, widths = args[0], args[1]
        if len(args) > 2 and args[2] != "constant":  # of the dimensions behind the first two
            return self._by_samples(value, args[1:], kwargs)
        if value.further or value.at >= len(value.shape) - len(widths) // 2:
            value = self._leading(value)
        return self._emit(function_of(self.origin), (value, *args[1:]), kwargs, value)

    def _matmul(self, args: Operands, kwargs: Named) -> Value:
        a, b = args
        if min(len(a.shape), len(b.shape)) < 2:
            raise ValueError(f"{self.origin.name} multiplies by a vector")
        both = [v for v in (a, b) if v.at is not None]
        if all(v.at == 0 and not v.further and len(v.shape) > 2 for v in both) and len(a.shape) == len(b.shape):
            return self._emit(aten.matmul.default, (a, b), {}, both[0])
        a, b = (self._leading(v, len(self.shape)) for v in (a, b))
        return self._emit(aten.matmul.default, (a, b), {}, next(v for v in (a, b) if v.at is not None))

    def _attention(self, args: Operands, kwargs: Named) -> Value:
        args, kwargs = [*args], dict(kwargs)
        masks = [args[3]] if len(args) > 3 else [kwargs.get("attn_mask")]
        if len(self.shape) == 4 and self.shape[0] == 1:
            place: Callable[[Value], Value] = self._unit
        elif len(self.shape) == 3:
            place = self._further
        elif len(self.shape) == 4 and (masks[0] is None or (masks[0].at is None and masks[0].shape[:-3] in ((), (1,)))):
            args[:3] = [self._merged(value) for value in args[:3]]
            return self._parted(self._emit(function_of(self.origin), args, kwargs, args[0], (1, *self.shape[1:])))
        else:
            raise ValueError(f"{self.origin.name} is an attention of {len(self.shape)} dimensions")
        args[:3] = [place(value) for value in args[:3]]
        if masks[0] is not None and masks[0].at is not None:
            mask = self._leading(masks[0], 3 if len(self.shape) == 3 else len(masks[0].shape))
            if len(self.shape) == 4 and len(mask.shape) == 4:
                mask = self._unit(mask)
            elif len(self.shape) == 4:
                mask = self._leading(mask, 3)
            if len(args) > 3:
                args[3] = mask
            else:
                kwargs["attn_mask"] = mask
        return self._emit(function_of(self.origin), args, kwargs, args[0])

    def _embedding(self, args: Operands, kwargs: Named) -> Value:
        if args[0].at is not None:
            raise ValueError(f"the table of {self.origin.name} differs between samples")
        return self._emit(aten.embedding.default, args, kwargs, args[1])

    def _index(self, args: Operands, kwargs: Named) -> Value:
        value, indices = args[0], list(args[1])
        given = [i for i in indices if i is not None]
        if value.at is None:
            if len(indices) != 1 or indices[0].node.meta["val"].dtype == torch.bool:
                raise ValueError(f"{self.origin.name} reads at places that differ between samples")
            return self._emit(aten.index.Tensor, (value, indices), {}, indices[0])
        if any(i.at is not None for i in given):
            raise ValueError(f"{self.origin.name} reads at places that differ between samples")
        gap = [i for i, index in enumerate(indices) if index is not None]
        if gap != list(range(gap[0], gap[0] + len(gap))):
            raise ValueError(f"{self.origin.name} reads at places of dimensions that are apart")
        if value.at == 0 and not value.further and indices[0] is None:
            return self._emit(aten.index.Tensor, (value, indices), {}, value)
        value = self._leading(value)
        return self._emit(aten.index.Tensor, (value, [None, *indices]), {}, value)

    def _outer(self, args: Operands, kwargs: Named) -> Value:
        a, b = args
        rows = self._reshape_to(a, (*a.shape, 1))
        values, like = self._aligned([rows, b])
        return self._emit(aten.mul.Tensor, tuple(values), {}, like)

    def _einsum(self, args: Operands, kwargs: Named) -> Value:
        """Other orders of dimensions, and products that sum nothing, such as `...n,d->...nd`."""
        terms, _, result = args[0].replace(" ", "").replace("...", ".").partition("->")
        if sorted(terms) == sorted(result) and "." not in result:
            return self._in_order(args[1][0], [terms.index(letter) for letter in result])
        rank = len(self.shape) - len(result.replace(".", "")) if "." in result else 0
        if len(args[1]) != 2 or {*terms} - {","} != {*result}:
            raise ValueError(f"{self.origin.name} is the sum {args[0]}")
        factors = []
        for term, value in zip(terms.split(","), args[1], strict=True):
            sizes = dict(zip(term.replace(".", ""), value.shape[term.count(".") and rank :], strict=True))
            own = [value.shape[:rank] if "." in term else (1,) * rank] if rank else []
            shape = [*(own[0] if own else ()), *(sizes.get(letter, 1) for letter in result.replace(".", ""))]
            if [c for c in result if c in term] != [*term] or result.find(".") > 0:
                raise ValueError(f"{self.origin.name} permutes its operands in {args[0]}")
            factors.append(self._reshape_to(value, tuple(shape)))
        values, like = self._aligned(factors)
        return self._emit(aten.mul.Tensor, tuple(values), {}, like)

    def _reshape_to(self, value: Value, shape: tuple[int, ...]) -> Value:
        if value.at is None:
            made = self.graph.call_function(aten.reshape.default, (value.node, list(shape)))
            dtype = value.node.meta["val"].dtype
            made.meta = {**self.origin.meta, "val": torch.empty(shape, dtype=dtype, device="meta")}
            return Value(made, shape)
        whole = self._leading(value)
        if shape[:1] == (1,):
            return self._reshaped(whole, [-1, *shape[1:]], 0, False, shape)
        return self._reshaped(whole, [-1, *shape], 0, True, shape)

    def _copy(self, args: Operands, kwargs: Named) -> Value:
        """What is written, whatever it is written to."""
        source: Value = args[1]
        dtype = self.origin.meta["val"].dtype
        if source.node.meta["val"].dtype != dtype:
            source = self._emit(aten.to.dtype, (source, dtype), {}, source, source.shape)
        if source.shape == self.shape:
            return source
        if source.at is None:
            return self._emit(aten.expand.default, (source, list(self.shape)), {}, None)
        return self._expand((source, list(self.shape)), {})

    def _put(self, args: Operands, kwargs: Named) -> Value:
        """One value where a mask is true, or the values of another tensor at the same places."""
        value, indices, source = args[:3]
        if (other := self._read_there()) is not None:
            return self._written_there(value, indices[-1], other)
        mask = indices[0]
        if len(indices) != 1 or mask.node.meta["val"].dtype != torch.bool or math.prod(source.shape) != 1:
            raise ValueError(f"{self.origin.name} writes at places that differ between samples")
        mask = self._reshape_to(mask, mask.shape + (1,) * (len(value.shape) - len(mask.shape)))
        values, like = self._aligned([mask, self._reshape_to(source, ()), value])
        return self._emit(aten.where.self, tuple(values), {}, like)

    def _read_there(self) -> Value | None:
        """The tensor of which values are read along the last dimension where they are written, or None."""
        _, places, source = arguments(self.origin)[:3]
        while source.target in RESHAPES and _drops_ones(source):
            source = operand(source, 0)
        if source.target is not aten.index.Tensor or _stored(arguments(source)[1]) != _stored(places):
            return None
        x, last = operand(source, 0), places[-1]
        known = all(index is None for index in places[:-1]) and len(places) == len(self.shape)
        same = x.meta["val"].shape == self.shape and self.values[last].at is None
        found: Value = self.values[x]
        return found if known and same else None

    def _written_there(self, value: Value, places: Value, other: Value) -> Value:
        none = self.graph.call_function(aten.zeros.default, ([self.shape[-1]],), {"dtype": torch.bool})
        none.meta = {**self.origin.meta, "val": torch.empty(self.shape[-1:], dtype=torch.bool, device="meta")}
        mask = self.graph.call_function(aten.index_fill.int_Scalar, (none, 0, places.node, True))
        mask.meta = dict(none.meta)
        values, like = self._aligned([Value(mask, self.shape[-1:]), other, value])
        return self._emit(aten.where.self, tuple(values), {}, like)

    def _diagonal(self, args: Operands, kwargs: Named) -> Value:
        """A matrix of each row, with it as its diagonal: the columns of the identity, times the row."""
        if len(args) > 1 or kwargs:
            raise ValueError(f"{self.origin.name} makes other diagonals than the main one")
        size = self.shape[-1]
        one = self.graph.call_function(aten.eye.default, (size,))
        one.meta = {**self.origin.meta, "val": torch.empty(size, size, device="meta")}
        column = self._reshape_to(args[0], (*args[0].shape, 1))
        values, like = self._aligned([column, Value(one, (size, size))])
        return self._emit(aten.mul.Tensor, tuple(values), {}, like)

    def _complex(self, args: Operands, kwargs: Named) -> Value:
        value = args[0]
        if not value.further and value.at >= min(len(value.shape), len(self.shape)) - 1:
            value = self._leading(value)
        return self._emit(function_of(self.origin), (value,), {}, value)

    def _scatter(self, args: Operands, kwargs: Named) -> Value:
        value, source, *rest = args
        target = function_of(self.origin)
        dim = (rest[0] if rest else kwargs.get("dim", 0)) % len(value.shape)
        kwargs = {key: given for key, given in kwargs.items() if key != "dim"}
        value, source = (self._further(v) for v in (value, source))
        return self._emit(target, (value, source, dim + 1, *rest[1:]), kwargs, value)


_RULES: dict[Target, Callable[[_Batching, Operands, Named], Operand]] = {
    aten.permute.default: _Batching._permute,
    aten.transpose.int: _Batching._permute,
    aten.swapaxes.default: _Batching._permute,
    aten.t.default: _Batching._permute,
    aten.select.int: _Batching._select,
    aten.cat.default: _Batching._cat,
    aten.stack.default: _Batching._stack,
    aten.pad_sequence.default: _Batching._pad_sequence,
    aten.expand.default: _Batching._expand,
    aten.broadcast_to.default: _Batching._expand,
    aten.repeat.default: _Batching._repeat,
    aten.pad.default: _Batching._pad,
    aten.constant_pad_nd.default: _Batching._pad,
    aten.matmul.default: _Batching._matmul,
    aten.bmm.default: _Batching._matmul,
    aten.mm.default: _Batching._matmul,
    aten.scaled_dot_product_attention.default: _Batching._attention,
    aten.embedding.default: _Batching._embedding,
    aten.index.Tensor: _Batching._index,
    aten.outer.default: _Batching._outer,
    aten.einsum.default: _Batching._einsum,
    aten.concat.default: _Batching._cat,
    aten.view_as_complex.default: _Batching._complex,
    aten.view_as_real.default: _Batching._complex,
    aten.copy.default: _Batching._copy,
    aten.fill.Tensor: _Batching._copy,
    aten.index_put.default: _Batching._put,
    aten.diag_embed.default: _Batching._diagonal,
    aten.slice_scatter.default: _Batching._scatter,
    aten.select_scatter.default: _Batching._scatter,
}


def _stored(places: Sequence[object]) -> list[object]:
    """The places of an index, by the names of their values where these are stored."""
    return [p.target if isinstance(p, fx.Node) and p.op == "get_attr" else p for p in places]


def _drops_ones(node: fx.Node) -> bool:
    """Whether a reshape drops leading dimensions of one."""
    before, after = (tuple(n.meta["val"].shape) for n in (operand(node, 0), node))
    return before[len(before) - len(after) :] == after and math.prod(before) == math.prod(after)


def _on_meta(meta: Named) -> Named:
    """What a node is marked with, with shapes and types in place of values."""
    value = meta.get("val")
    if isinstance(value, Tensor):
        value = torch.empty(tuple(value.shape), dtype=value.dtype, device="meta")
    return {**meta, "val": value}


def _mapped(tree: Operand, change: Callable[[Value], Operand]) -> Operand:
    if isinstance(tree, Value):
        return change(tree)
    if isinstance(tree, tuple | list):
        return type(tree)([_mapped(part, change) for part in tree])
    if isinstance(tree, dict):
        return {key: _mapped(part, change) for key, part in tree.items()}
    return tree


def _nodes(tree: Operand) -> Operand:
    return _mapped(tuple(tree) if isinstance(tree, list) else tree, lambda value: value.node)


def _values(tree: Operand) -> list[Value]:
    found: list[Value] = []
    _mapped(tree, found.append)
    return found
