"""The fake-quantized program with variables in the place of stored tensors: what training changes.

Every variable is a function of a tensor ``theta``, zero at the start and without a unit, so that one learning rate
serves all variables of a kind whatever their size: scales are multiplied by ``exp(theta)``, floats move by ``theta``
times their root mean square, latent weights by ``theta`` steps of their table. What the program reads is projected to
the stored type in every step, with straight-through gradients: the program that is trained is the one that is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler import ops
from mpq_compiler.aten import aten
from mpq_compiler.formats.base import F16_MAX, F16_TINY, nearest_codes, rising
from mpq_compiler.program import Interpreter, Program, arguments, operand

EDGE = 0.02
"""Of a step of the table: how far within its cell a latent weight starts at least."""


class Kind(StrEnum):
    """What a variable is to the program; learning rates go by it."""

    LATENT = "latent"
    """A float weight, of which the program sees the nearest level."""
    SCALE = "scale"
    OFFSET = "offset"
    RANGE = "range"
    """Scales of activations, one a time group."""
    ZERO = "zero"
    """Zero points of activations."""
    FLOAT = "float"
    """Biases, norms, embeddings, factors of low-rank branches."""


@dataclass(frozen=True)
class Variable:
    """A stored tensor, or a latent weight, as a function of theta."""

    kind: Kind
    start: Tensor
    """f32, at theta = 0."""
    unit: Tensor
    """f32 that broadcasts over ``start``: what theta = 1 adds (SCALE and RANGE: not used)."""
    dtype: torch.dtype
    """Of the stored tensor."""
    most: int = 0
    """ZERO: the largest code."""

    def __call__(self, theta: Tensor) -> Tensor:
        """f32, as the program reads it."""
        if self.kind in (Kind.SCALE, Kind.RANGE):
            value = (self.start * theta.exp()).clamp(F16_TINY, F16_MAX)
        else:
            value = self.start + self.unit * theta
        if self.kind == Kind.LATENT:
            return value
        if self.kind == Kind.ZERO:
            value = value.clamp(0, self.most)
            return value + (value.round() - value).detach()
        return value + (value.to(self.dtype).to(torch.float32) - value).detach()

    @torch.no_grad()
    def stored(self, theta: Tensor) -> Tensor:
        """The tensor of the store; a latent weight as f32."""
        value = self(theta)
        return value.round().to(self.dtype) if self.kind == Kind.ZERO else value.to(self.dtype)


@dataclass(frozen=True)
class Settled:
    """A weight whose codes are chosen: the node of its value, and the store names of what it is made of."""

    node: fx.Node
    codes: str
    scale: str
    offset: str | None
    lut: str | None
    row_class: str | None
    shape: tuple[int, ...]
    segments: tuple[int, ...] | None
    signs: str | None = None
    alpha: str | None = None

    @property
    def path(self) -> str:
        """The parameter's name in the model."""
        return self.codes.split(":")[0]

    def table(self, program: Program) -> Tensor | None:
        """LUT int8 [classes, entries], the branch merged in; None where the code is the value."""
        if self.lut is None:
            return None
        lut = program.tensors[self.lut]
        if self.signs is None:
            return lut
        codes = torch.zeros(1, dtype=torch.uint8)
        return ops.merge_branch(codes, lut, codes, program.tensors[str(self.alpha)])[1]

    def merged_codes(self, program: Program) -> Tensor:
        """Codes [O, K] of `table`."""
        codes = program.tensors[self.codes]
        return codes if self.signs is None else codes * 2 + program.tensors[self.signs]


def settled(program: Program) -> list[Settled]:
    """The weights with codes, in graph order; base and branch are one."""
    found = []
    branched = {
        operand(n, 0): n for n in program.graph.nodes
        if n.target is aten.add.Tensor and isinstance(n.args[1], fx.Node) and n.args[1].target is ops.binary_branch
    }  # fmt: skip
    for node in program.graph.nodes:
        if node.target is not ops.dequantize_weight:
            continue
        *parts, shape = arguments(node)[:6]
        names = [None if part is None else str(part.target) for part in parts]
        segments = tuple(arguments(node)[6]) if len(node.args) > 6 and node.args[6] else None
        total, signs, alpha = node, None, None
        if node in branched:
            total = branched[node]
            signs_of, _, alpha_of, _ = arguments(operand(total, 1))
            signs, alpha = str(signs_of.target), str(alpha_of.target)
        codes, scale, offset, lut, row_class = names
        found.append(
            Settled(total, str(codes), str(scale), offset, lut, row_class, tuple(shape), segments, signs, alpha)
        )
    return found


class _Levels(torch.autograd.Function):
    """Rows [O, K] moved to their nearest levels.

    Gradients (Esser 2020, arXiv 1902.08153, eq. 2-3, for any table), with t = (w - offset) / scale: a weight's passes
    straight through up to half a step beyond the table's ends; a scale's is ``entry - t`` between them and ``entry``
    beyond; an offset's is what does not reach the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        lut: Tensor | None,
        row_class: Tensor | None,
        segments: tuple[int, ...] | None,
    ) -> Tensor:
        codes = nearest_codes(rows, scale, offset, lut, row_class, segments)
        entry = ops.entries(codes, lut, row_class)
        wide = ops.column_scale(scale, segments, rows.shape[1])
        shifted = rows if offset is None else rows - offset[:, None]
        t = shifted / wide
        low, high = _ends(lut, row_class, len(rows))
        inside = (t >= low) & (t <= high)
        ctx.save_for_backward(inside, torch.where(inside, entry - t, entry))
        ctx.shape, ctx.segments, ctx.shifts = scale.shape, segments, offset is not None
        level = entry * wide
        return level if offset is None else level + offset[:, None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        inside, slope = ctx.saved_tensors
        to_rows = gradient * inside
        product = gradient * slope
        if ctx.segments is None or len(ctx.segments) == 1:
            to_scale = product.sum(1, keepdim=True).expand(ctx.shape)
        else:
            index = ops.column_segments(ctx.segments, product.shape[1])
            to_scale = torch.zeros(ctx.shape).index_add(1, index, product)
        to_offset = (gradient - to_rows).sum(1) if ctx.shifts else None
        return to_rows, to_scale, to_offset, None, None, None


def _ends(lut: Tensor | None, row_class: Tensor | None, rows: int) -> tuple[Any, Any]:
    """Where the table of each row ends, half a step beyond its extreme entries."""
    if lut is None:
        return -ops.LUT_MAX - 0.5, ops.LUT_MAX + 0.5
    gaps, levels = _gaps(lut), rising(lut)[0][:, :1]
    span = gaps.sum(1, keepdim=True)
    step = span / gaps.gt(0).sum(1, keepdim=True).clamp_min(1)
    low, high = levels - step / 2, levels + span + step / 2
    if lut.shape[0] == 1:
        return low[0], high[0]
    assert row_class is not None
    classes = ops.row_classes(row_class, rows)
    return low[classes], high[classes]


class _Rounded(torch.autograd.Function):
    """``s * round(clamp(x / s, -z, most - z))`` with the gradients of `ops.fake_quantize`, in one step.

    s and z broadcast over x; gradients to x, s and z (Esser 2020, eq. 2-3; a zero point moves what is clamped).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, z: Tensor, most: int) -> Tensor:
        t = x * (torch.ones((), dtype=torch.float32) / s)
        clamped = torch.maximum(torch.minimum(t, most - z), -z)
        inside, code = t == clamped, torch.round(clamped)
        ctx.save_for_backward(inside, torch.where(inside, code - t, code), s)
        return code * s

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        inside, slope, s = ctx.saved_tensors
        to_x = gradient * inside
        dims = [d for d in range(gradient.dim()) if s.shape[d] == 1 and gradient.shape[d] > 1]
        to_s = (gradient * slope).sum(dims, keepdim=True)
        to_z = (to_x - gradient).sum(dims, keepdim=True) * s
        return to_x, to_s, to_z, None


class Student(Interpreter):
    """Runs the program with other values of what is stored; differentiable in them."""

    def __init__(self, program: Program, values: Mapping[str, Tensor]) -> None:
        """values: those of `values`."""
        super().__init__(program)
        self.values = values
        totals = [w.node for w in settled(program) if w.signs is not None and w.node.name in values]
        self.unread = frozenset(operand(total, part) for total in totals for part in (0, 1))

    def attribute(self, name: str) -> Any:
        return self.values[name] if name in self.values else super().attribute(name)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.name in self.values:
            return self.values[node.name]
        if node in self.unread:
            return None
        if node.target is ops.fake_quantize:
            x, scale, zero, group, bits = args
            return _Rounded.apply(
                x, *(ops.per_sample(t.to(torch.float32), group, x) for t in (scale, zero)), 2**bits - 1
            )
        return super().call(node, args, kwargs)


def values(program: Program, variables: Mapping[str, Variable], thetas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """f32 values of the variables by the names of the stored tensors, and of the weights they make by that of the node.

    variables: by the name of the stored tensor; a latent weight by that of its codes.
    """
    found = {name: v(thetas[name]) for name, v in variables.items() if v.kind != Kind.LATENT}
    for weight in settled(program):
        if weight.scale not in found:
            continue
        scale, offset = found[weight.scale], None if weight.offset is None else found[weight.offset]
        row_class = None if weight.row_class is None else program.tensors[weight.row_class]
        table, segments = weight.table(program), weight.segments
        if weight.codes in variables:
            rows = variables[weight.codes](thetas[weight.codes])
            level = _Levels.apply(rows, scale, offset, table, row_class, segments)
        else:
            codes = weight.merged_codes(program)
            level = ops.dequantize_weight(codes, scale, offset, table, row_class, codes.shape, segments)
        found[weight.node.name] = level.reshape(weight.shape)
    return found


def variables(program: Program, latent: bool) -> dict[str, Variable]:
    """All that can be trained, in graph order: latent weights too, or else the codes stay what they are."""
    found: dict[str, Variable] = {}
    tensors, originals = program.tensors, program.facts["latents"]
    for weight in settled(program):
        found[weight.scale] = _scale(Kind.SCALE, tensors[weight.scale])
        if weight.offset is not None:
            found[weight.offset] = _float(Kind.OFFSET, tensors[weight.offset])
        if latent:
            rows = tensors.read(originals[weight.node.name]).flatten(1)
            table = weight.table(program)
            step = 1.0 if table is None else float(_mean_step(table))
            unit = ops.column_scale(tensors.read(weight.scale), weight.segments, rows.shape[1]) * step
            found[weight.codes] = Variable(Kind.LATENT, _within(program, weight, rows), unit, torch.float32)
    for node in program.graph.nodes:
        if node.target in _SCALED:
            scale = str(operand(node, 1).target)
            found[scale] = _scale(_SCALED[node.target], tensors[scale])
        for scale, zero, bits in _tables(node):
            found[scale] = _scale(Kind.RANGE, tensors[scale])
            start = tensors.read(zero).to(torch.float32)
            found[zero] = Variable(Kind.ZERO, start, torch.ones(()), tensors[zero].dtype, 2**bits - 1)
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name not in found and _is_parameter(tensors[name], name):
            found[name] = _float(Kind.FLOAT, tensors[name])
    return found


_SCALED = {ops.fake_quantize_float: Kind.RANGE, ops.dequantize_float8: Kind.SCALE}
"""Calls of small floats, whose second operand is their scale."""


def _within(program: Program, weight: Settled, rows: Tensor) -> Tensor:
    """The float weights [O, K], moved just into the cells of the codes that were chosen for them.

    What GPTQ or learned rounding has chosen is where training starts, and the float weight says to which side a code
    may change first.
    """
    tensors, codes, table = program.tensors, weight.merged_codes(program), weight.table(program)
    scale = ops.column_scale(tensors[weight.scale], weight.segments, rows.shape[1])
    offset = 0 if weight.offset is None else tensors.read(weight.offset)[:, None]
    if table is None:
        low, high = codes - 0.5, codes + 0.5
        margin: Any = EDGE
    else:
        levels, order = rising(table)
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = torch.full_like(levels[:, :1], torch.inf)
        classes = ops.row_classes(None if weight.row_class is None else tensors[weight.row_class], len(rows))
        rank = order.argsort(1)[classes].gather(1, codes.long())
        low, high = (torch.cat(parts, 1)[classes].gather(1, rank) for parts in ((-ends, middles), (middles, ends)))
        margin = EDGE * float(_mean_step(table))
    t = (rows - offset) / scale
    return torch.minimum(torch.maximum(t, low + margin), high - margin) * scale + offset


def _tables(node: fx.Node) -> list[tuple[str, str, int]]:
    """Store names of scale and zero point, and the bits, of the quantizers in a call."""
    if node.target is ops.fake_quantize:
        _, scale, zero, _, bits = arguments(node)
        return [(str(scale.target), str(zero.target), bits)]
    if node.target is ops.fake_quantize_attention:
        _, _, _, _, scale, zero, *_, bits = arguments(node)
        return [(str(scale.target), str(zero.target), bits)]
    return []


def _is_parameter(tensor: Tensor, name: str) -> bool:
    return tensor.is_floating_point() and not name.startswith(("constant.", "time_groups."))


def _scale(kind: Kind, stored: Tensor) -> Variable:
    return Variable(kind, stored.to(torch.float32), torch.ones(()), stored.dtype)


def _float(kind: Kind, stored: Tensor) -> Variable:
    start = stored.to(torch.float32)
    size = start.square().mean().sqrt()
    return Variable(kind, start, size if size > 0 else torch.ones(()), stored.dtype)


def _mean_step(table: Tensor) -> Tensor:
    """The mean distance of neighbouring entries, of all classes."""
    gaps = _gaps(table)
    return gaps.sum() / gaps.gt(0).sum().clamp_min(1)


def _gaps(lut: Tensor) -> Tensor:
    """The distances of neighbouring levels [classes, entries - 1], zero behind the last."""
    levels, _ = rising(lut)
    return torch.where(levels[:, 1:].isfinite(), levels[:, 1:] - levels[:, :-1], 0)
