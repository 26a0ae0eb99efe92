"""The fake-quantized program with variables in the place of stored tensors: what training changes.

Every variable is a function of a tensor ``theta``, zero at the start and without a unit, so that one learning rate
serves all variables of a kind whatever their size: scales are multiplied by ``exp(theta)``, floats move by ``theta``
times their root mean square, latent weights by ``theta`` steps of their table. What the program reads is projected to
the stored type in every step, with straight-through gradients: the program that is trained is the one that is stored.
Adapters of low rank may move latent weights, and networks make the scales of time groups; neither is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mpq_compiler import ops
from mpq_compiler.aten import aten
from mpq_compiler.formats.base import F16_MAX, F16_TINY, nearest_codes, rising
from mpq_compiler.program import Interpreter, Program, arguments, operand

EDGE = 0.02
"""Of a step of the table: how far within its cell a latent weight starts at least."""
UP, DOWN = 8.0, 80.0
"""What theta = 1 is to adapters: so many steps of the table in B, and so many times its own size in A."""
WIDTHS = (64, 64, 64, 64, 1)
"""Of the network that makes scales of times: its input, and the outputs of its four layers."""


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

    def zeros(self) -> Tensor:
        """The theta of the start."""
        return torch.zeros_like(self.start)

    def moved(self, theta: Tensor) -> Tensor:
        """f32, before it is projected to the stored type."""
        if self.kind in (Kind.SCALE, Kind.RANGE):
            return self.start * theta.exp()
        return self.start + self.unit * theta

    def __call__(self, theta: Tensor) -> Tensor:
        """f32, as the program reads it."""
        value = self.moved(theta)
        if self.kind == Kind.LATENT:
            return value
        if self.kind in (Kind.SCALE, Kind.RANGE):
            value = value.clamp(F16_TINY, F16_MAX)
        elif self.kind == Kind.ZERO:
            value = value.clamp(0, self.most)
            return value + (value.round() - value).detach()
        return value + (value.to(self.dtype).to(torch.float32) - value).detach()

    @torch.no_grad()
    def stored(self, theta: Tensor) -> Tensor:
        """The tensor of the store; a latent weight as f32."""
        value = self(theta)
        return value.round().to(self.dtype) if self.kind == Kind.ZERO else value.to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Adapted(Variable):
    """A latent weight [O, K] that adapters of rank R move (QALoRA of EfficientDM, arXiv 2310.03270).

    ``start + unit * B A / sqrt(R)``: the sum is what is quantized, and a convolution's A of k x k and B of 1 x 1 are
    one product of rows. Theta [O + K, R] is B over the transpose of what A has moved, in parts of `UP` and `DOWN`.
    Rates are scale-aware as in the paper, by the unit: B learns in steps of its row and A, of unit variance, in none,
    so that twice the weight is moved twice as far by the same theta. (The paper's rates have the step in both factors,
    and that property only while A hardly moves.) ``start`` is the dequantized weight, as published: adapters cannot
    choose which weights they move, and float weights near a border would change codes by chance.
    """

    down: Tensor
    """f32 [K, R]: the transpose of A at the start."""

    def zeros(self) -> Tensor:
        return torch.zeros(len(self.start) + len(self.down), self.down.shape[1])

    def moved(self, theta: Tensor) -> Tensor:
        up, down = theta.split([len(self.start), len(self.down)])
        product = (UP * up) @ (self.down + DOWN * down).T / math.sqrt(self.down.shape[1])
        return self.start + self.unit * product


@dataclass(frozen=True, kw_only=True)
class Timed(Variable):
    """Scales of activations [G] that a network makes of the times of their groups (TDQ, arXiv 2306.02316).

    ``start * softplus(network(embedding))``, 1 at the start, so that the network learns in units of the scales that
    were calibrated. Theta [P] is what its parameters have moved, those of a layer in units of one by its inputs.
    """

    embedding: Tensor
    """f32 [G, WIDTHS[0]]: of the groups' times."""
    network: Tensor
    """f32 [P]: its parameters at the start, layer by layer, weights before biases."""

    def zeros(self) -> Tensor:
        return torch.zeros_like(self.network)

    def moved(self, theta: Tensor) -> Tensor:
        parameters, x = self.network + self.unit * theta, self.embedding
        sizes = [size for inputs, outputs in pairwise(WIDTHS) for size in (inputs * outputs, outputs)]
        weights = parameters.split(sizes)
        for number, (weight, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
            x = F.linear(F.relu(x) if number else x, weight.reshape(len(bias), -1), bias)
        return self.start * F.softplus(x[:, 0])


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
        code = torch.maximum(torch.minimum(t, most - z), -z)
        inside = torch.eq(t, code, out=torch.empty_like(t))  # 0 and 1: with booleans torch takes twice as long
        code.round_()
        ctx.save_for_backward(inside.to(torch.uint8), torch.sub(code, t.mul_(inside), out=t), s)
        return code.mul_(s)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        inside, slope, s = ctx.saved_tensors
        to_x = gradient * inside.to(torch.float32)
        to_s = (gradient * slope).sum_to_size(s.shape)
        to_z = (to_x - gradient).sum_to_size(s.shape) * s
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


def variables(
    program: Program, latent: bool, adapters: int = 0, times: Tensor | None = None, seed: int = 0
) -> dict[str, Variable]:
    """All that can be trained, in graph order: latent weights too, or else the codes stay what they are.

    adapters: the rank of what moves latent weights; 0: each weight moves by itself. times: those of the time groups
    [G], from 0 to 1 over the range of times, for networks that make the scales of activations; None: each scale moves
    by itself. seed: of what adapters and networks start with.
    """
    generator = torch.Generator().manual_seed(seed)
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
            if adapters:
                found[weight.codes] = _adapted(_dequantized(program, weight), unit, adapters, generator)
            else:
                found[weight.codes] = Variable(Kind.LATENT, _within(program, weight, rows), unit, torch.float32)
    for node in program.graph.nodes:
        if node.target in _SCALED:
            scale = str(operand(node, 1).target)
            found[scale] = _scale(_SCALED[node.target], tensors[scale])
        for scale, zero, bits in _tables(node):
            found[scale] = _scale(Kind.RANGE, tensors[scale])
            start = tensors.read(zero).to(torch.float32)
            found[zero] = Variable(Kind.ZERO, start, torch.ones(()), tensors[zero].dtype, 2**bits - 1)
    if times is not None:
        embedding = _embedding(times)
        for name, variable in found.items():
            if variable.kind == Kind.RANGE:
                found[name] = _timed(variable, embedding, generator)
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


def _dequantized(program: Program, weight: Settled) -> Tensor:
    """The levels [O, K] of the codes that were chosen."""
    tensors, codes = program.tensors, weight.merged_codes(program)
    offset, row_class = (None if n is None else tensors[n] for n in (weight.offset, weight.row_class))
    table, scale = weight.table(program), tensors[weight.scale]
    return ops.dequantize_weight(codes, scale, offset, table, row_class, codes.shape, weight.segments)


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


def _adapted(start: Tensor, unit: Tensor, rank: int, generator: torch.Generator) -> Adapted:
    """A latent weight with adapters: B zero, A Kaiming-uniform, whose size is in the unit."""
    down = torch.empty(start.shape[1], rank).uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
    return Adapted(Kind.LATENT, start, unit.mean(1, keepdim=True), torch.float32, down=down)


def _timed(table: Variable, embedding: Tensor, generator: torch.Generator) -> Timed:
    """A table of scales that a network makes: what it starts with."""
    network: list[Tensor] = []
    unit: list[Tensor] = []
    for inputs, outputs in pairwise(WIDTHS):
        network += [torch.randn(outputs * inputs, generator=generator) * math.sqrt(2 / inputs), torch.zeros(outputs)]
        unit += [torch.full((outputs * inputs,), 1 / inputs), torch.ones(outputs)]
    network[-2:] = torch.zeros(WIDTHS[-2]), torch.full((1,), math.log(math.e - 1))  # softplus makes 1 of it
    return Timed(table.kind, table.start, torch.cat(unit), table.dtype, embedding=embedding, network=torch.cat(network))


def _embedding(times: Tensor) -> Tensor:
    """[G, WIDTHS[0]]: sines of times [G] from 0 to 1, as diffusion models make them of 1000 timesteps."""
    count = WIDTHS[0] // 2
    phase = 1000 * times[:, None] * torch.exp(torch.arange(count) * (-math.log(10000) / count))
    return torch.cat([phase.cos(), phase.sin()], 1)


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
