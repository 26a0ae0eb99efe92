"""The student: the fake-quantized program with trainable variables in place of stored tensors.

Every variable is a function of a tensor ``theta`` that is zero at the start and has no unit, so that one learning rate
serves all variables of a kind whatever their size. Scales are multiplied by ``exp(theta)``, floats move by ``theta``
times their root mean square, latent weights by ``theta`` steps of their table. Every step projects the variables to
their stored type, with straight-through gradients, so that the trained program is the stored one. Low-rank adapters may
move latent weights, and networks may produce the scales of time groups; neither is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import F16_TINY
from mpq_compiler.formats.contract import WeightTables, rising
from mpq_compiler.formats.low_rank import truncated
from mpq_compiler.ir import ops
from mpq_compiler.ir.graph import arguments, operand, part_of
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import Program, TensorStore
from mpq_compiler.ir.stored_tensors import entropy_format
from mpq_compiler.quantization.settle import LATENTS
from mpq_compiler.training.variables import (
    EDGE,
    WIDTHS,
    Adapted,
    Kind,
    Settled,
    Timed,
    Variable,
    ends,
    gaps,
    settled,
)

RANK = 16
"""The rank of the adapters of weights that are too wide to be trained themselves."""


Context = Any
"""What a function of autograd hands from one way to the other, which torch does not type."""


class _Levels(torch.autograd.Function):
    """Quantizes rows [O, K] to their nearest levels, with straight-through gradients.

    The gradients are those of Esser 2020 (arXiv 1902.08153, eq. 2-3), for any table. With t = (w - offset) / scale, a
    weight's gradient passes straight through up to half a step beyond the table's ends. A scale's is ``entry - t``
    within these limits and ``entry`` beyond. An offset receives the gradient that does not reach the weights.
    """

    @staticmethod
    def forward(ctx: Context, rows: Tensor, *parts: Any) -> Tensor:
        """``parts`` are those of `WeightTables`, one by one: autograd follows tensors that are operands themselves."""
        tables: WeightTables[Tensor] = WeightTables(*parts)
        scale, offset, segments = tables.scale, tables.offset, tables.segments
        entry = contract.entries(contract.quantize(rows, tables), tables.lut, tables.row_class)
        wide = contract.column_scale(scale, segments, rows.shape[1])
        shifted = rows if offset is None else rows - offset[:, None]
        t = shifted / wide
        low, high = ends(tables, len(rows))
        inside = (t >= low) & (t <= high)
        ctx.save_for_backward(inside, torch.where(inside, entry - t, entry))
        ctx.shape, ctx.segments, ctx.shifts = scale.shape, segments, offset is not None
        level = entry * wide
        return level if offset is None else level + offset[:, None]

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        inside, slope = ctx.saved_tensors
        to_rows = gradient * inside
        product = gradient * slope
        if ctx.segments is None or len(ctx.segments) == 1:
            to_scale = product.sum(1, keepdim=True).expand(ctx.shape)
        else:
            index = contract.column_segments(ctx.segments, product.shape[1])
            to_scale = torch.zeros(ctx.shape).index_add(1, index, product)
        to_offset = (gradient - to_rows).sum(1) if ctx.shifts else None
        return to_rows, to_scale, to_offset, None, None, None


class _Rounded(torch.autograd.Function):
    """Fake-quantizes x in one step, ``s * round(clamp(x / s, -z, most - z))``, with gradients as `ops.fake_quantize`.

    s and z broadcast over x; all three get gradients (Esser 2020, eq. 2-3; a zero point moves what is clamped).
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, s: Tensor, z: Tensor, most: int) -> Tensor:
        t = x * (torch.ones((), dtype=torch.float32) / s)
        code = torch.maximum(torch.minimum(t, most - z), -z)
        inside = torch.eq(t, code, out=torch.empty_like(t))  # 0 and 1: with booleans torch takes twice as long
        code.round_()
        ctx.save_for_backward(inside.to(torch.uint8), torch.sub(code, t.mul_(inside), out=t), s)
        return code.mul_(s)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        inside, slope, s = ctx.saved_tensors
        to_x = gradient * inside.to(torch.float32)
        to_s = (gradient * slope).sum_to_size(s.shape)
        to_z = (to_x - gradient).sum_to_size(s.shape) * s
        return to_x, to_s, to_z, None


class _Scaled(torch.autograd.Function):
    """Hands on the output of a layer whose weight is in proportion to its rows' scales, with their gradients.

    A row's is the sum of ``gradient * (output - bias)`` over its scale. By way of the weight it would take as long as
    the layer itself, and a tensor as large as the weight for every part of a step.
    """

    @staticmethod
    def forward(ctx: Context, output: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(output, scale, bias)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        output, scale, bias = ctx.saved_tensors
        linear = output if bias is None else output - bias
        to_rows = (gradient * linear).flatten(0, -2).sum(0)
        return gradient, (to_rows / scale.flatten()).reshape(scale.shape), None


class Student(Interpreter):
    """Runs the program with other values in place of stored tensors; differentiable in these values."""

    def __init__(self, program: Program, values: Mapping[str, Tensor]) -> None:
        """Prepares a run with values as the function `values` makes them."""
        super().__init__(program)
        self.values = values
        weights = [w for w in settled(program) if w.node.name in values]
        self.unread = frozenset(operand(w.node, part) for w in weights if w.signs is not None for part in (0, 1))
        scales = ((w, values[w.tables.scale]) for w in weights if w.tables.scale in values)
        self.scaled = {
            layer: scale
            for w, scale in scales
            if scale.requires_grad and not values[w.node.name].requires_grad
            for layer in w.node.users
        }
        """Layers whose outputs, rather than their weights, have the gradients of these scales."""

    def attribute(self, name: str) -> Any:
        return self.values[name] if name in self.values else super().attribute(name)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.name in self.values:
            return self.values[node.name]
        if node in self.unread:
            return None
        if node.target is ops.fake_quantize:
            x, scale, zero, group, bits = args
            rounded: Callable[..., Tensor] = _Rounded.apply
            return rounded(
                x, *(ops.per_sample(t.to(torch.float32), group, x) for t in (scale, zero)), 2**bits - 1
            )
        output = super().call(node, args, kwargs)
        if node not in self.scaled:
            return output
        bias = args[2] if len(args) > 2 else None
        scaled: Callable[..., Tensor] = _Scaled.apply
        return scaled(output, self.scaled[node], bias)


def leaves(made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `values` as leaves of their own, which want gradients where these have any."""
    return {name: value.detach().requires_grad_(value.requires_grad) for name, value in made.items()}


def differentiable(made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `values`, or of their `leaves`, that have gradients."""
    return {name: value for name, value in made.items() if value.requires_grad}


def values(program: Program, variables: Mapping[str, Variable], thetas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Computes the values of the variables, f32 and differentiable in the thetas.

    Args:
        program: the fake-quantized program.
        variables: by the name of the stored tensor, a latent weight by the name of its codes.
        thetas: by the same names.

    Returns:
        The values by the names of the stored tensors, and the weights that they make by the names of their nodes. A
        weight of frozen codes and a scale a row has no gradient: `Student` has that of the scale from what layers
        compute of it.
    """
    found = {name: v(thetas[name]) for name, v in variables.items() if v.kind != Kind.LATENT}
    for weight in settled(program):
        if weight.tables.scale not in found and weight.codes not in variables:
            continue
        tables = weight.values(program, lambda name: found[name] if name in found else program.tensors[name])
        if weight.codes in variables:
            rows = variables[weight.codes](thetas[weight.codes])
            levels: Callable[..., Tensor] = _Levels.apply
            level = levels(rows, *tables)
        else:
            level = contract.dequantize(weight.merged_codes(program), tables)
            level = level.detach() if weight.by_row(tables) else level
        found[weight.node.name] = level.reshape(weight.shape)
    return found


@torch.no_grad()
def applied(program: Program, trained: Mapping[str, Variable], thetas: Mapping[str, Tensor]) -> Program:
    """Stores the variables' values, and the codes of latent weights, in a copy of the program."""
    program = program.fork()
    renamed: dict[str, str] = {}

    def store(name: str, tensor: Tensor) -> None:
        renamed[name] = program.tensors.add(f"{name.split(':')[0]}:{part_of(name) or 'trained'}", tensor)

    for name, variable in trained.items():
        if variable.kind != Kind.LATENT:
            store(name, variable.stored(thetas[name]))
    for weight in settled(program):
        if weight.codes not in trained:
            continue
        rows = trained[weight.codes].stored(thetas[weight.codes])
        tables = weight.values(program, lambda name: program.tensors[renamed.get(name, name)])
        codes = contract.quantize(rows, tables)
        if weight.signs is None:
            store(weight.codes, codes)
        else:
            store(weight.codes, codes >> 1)
            store(weight.signs, codes & 1)
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target in renamed:
            node.target = renamed[str(node.target)]
    for edge, plan in program.activations.items():
        scale_name, zero = (None if n is None else renamed.get(n, n) for n in (plan.scale, plan.zero_point))
        program.activations[edge] = replace(plan, scale=scale_name, zero_point=zero)
    return program


def tried(program: Program, trained: Mapping[str, Variable], thetas: Mapping[str, Tensor]) -> Program:
    """The program that `applied` returns, to be measured: what it stores goes with it.

    In the store of all stages it would stay, and names there would tell how often a training was judged, and resumed.
    """
    return applied(program.fork(tensors=TensorStore(program.tensors)), trained, thetas)


def variables(
    program: Program,
    latent: bool,
    adapters: int = 0,
    times: Tensor | None = None,
    seed: int = 0,
    widest: int | None = None,
    own: Container[str] | None = None,
    svd: bool = False,
) -> dict[str, Variable]:
    """Collects the variables of a program, in graph order, by the names of their stored tensors.

    Args:
        program: fake-quantized, with settled weights.
        latent: whether latent weights are among them, by the names of their codes; else the codes are frozen.
        adapters: the rank of the adapters that move latent weights; 0 moves each weight by itself.
        times: the times of the time groups [G], 0 to 1, for networks that produce the scales of activations; None moves
            each scale by itself.
        seed: decides the initial adapters and networks.
        widest: the most numbers of a weight that moves by itself; wider ones have adapters of rank `RANK`.
        own: the names of those to collect, of weights by their codes; None collects all.
        svd: whether adapters start along the error of the codes; else B is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Variable] = {}
    tensors, originals = program.tensors, program.facts[LATENTS]
    for weight in settled(program):
        if own is not None and weight.codes not in own:
            continue
        scale, offset = weight.tables.scale, weight.tables.offset
        coded = entropy_format(program, weight.path)
        found[scale] = replace(_scale(Kind.SCALE, tensors[scale]), together=coded is not None)
        if offset is not None:
            found[offset] = _float(Kind.OFFSET, tensors[offset])
        if latent and coded is None:  # other codes would take other bytes
            rows = tensors.read(originals[weight.node.name]).flatten(1)
            table = weight.table(program)
            step = 1.0 if table is None else float(_mean_step(table))
            unit = contract.column_scale(tensors.read(scale), weight.tables.segments, rows.shape[1]) * step
            rank = adapters or (RANK if widest is not None and rows.numel() > widest else 0)
            if rank:
                start = _dequantized(program, weight)
                error = rows - start if svd else None
                found[weight.codes] = _adapted(start, unit, rank, generator, error)
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
    found = {name: v for name, v in found.items() if own is None or name in own}
    if times is not None:
        embedding = _embedding(times)
        for name, variable in found.items():
            if variable.kind == Kind.RANGE:
                found[name] = _timed(variable, embedding, generator)
    for node in program.graph.nodes:
        name = str(node.target)
        wanted = node.op == "get_attr" and name not in found and (own is None or name in own)
        if wanted and _is_parameter(tensors[name], name):
            found[name] = _float(Kind.FLOAT, tensors[name])
    return found


_SCALED = {ops.fake_quantize_float: Kind.RANGE, ops.dequantize_float8: Kind.SCALE}
"""The operators on small floats, whose second operand is a scale, and the kind of that scale."""


def _within(program: Program, weight: Settled, rows: Tensor) -> Tensor:
    """Moves float weights [O, K] just into the cells of the codes that were chosen for them.

    Training thus starts from the codes that GPTQ or learned rounding chose, and the float weight decides to which side
    a code may change first.
    """
    codes, tables = weight.merged_codes(program), weight.values(program)
    scale = contract.column_scale(tables.scale, tables.segments, rows.shape[1])
    offset = 0 if tables.offset is None else tables.offset.to(torch.float32)[:, None]
    if tables.lut is None:
        low = (codes - 0.5).masked_fill(codes == -contract.LUT_MAX, -torch.inf)
        high = (codes + 0.5).masked_fill(codes == contract.LUT_MAX, torch.inf)
        margin: Any = EDGE
    else:
        levels, order = rising(tables.lut)
        middles = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = torch.full_like(levels[:, :1], torch.inf)
        classes = contract.row_classes(tables.row_class, len(rows))
        rank = order.argsort(1)[classes].gather(1, codes.long())
        low, high = (torch.cat(parts, 1)[classes].gather(1, rank) for parts in ((-ends, middles), (middles, ends)))
        margin = EDGE * float(_mean_step(tables.lut))
    t = (rows - offset) / scale
    return torch.minimum(torch.maximum(t, low + margin), high - margin) * scale + offset


def _dequantized(program: Program, weight: Settled) -> Tensor:
    """The levels [O, K] of the chosen codes."""
    return contract.dequantize(weight.merged_codes(program), weight.values(program))


def _tables(node: fx.Node) -> list[tuple[str, str, int]]:
    """The store names of scale and zero point, and the bits, of each quantizer in a call."""
    if node.target is ops.fake_quantize:
        _, scale, zero, _, bits = arguments(node)
        return [(str(scale.target), str(zero.target), bits)]
    if node.target is ops.fake_quantize_attention:
        _, _, _, _, scale, zero, *_, bits = arguments(node)
        return [(str(scale.target), str(zero.target), bits)]
    return []


def _is_parameter(tensor: Tensor, name: str) -> bool:
    return tensor.is_floating_point() and not name.startswith(("constant.", "time_groups."))


def _adapted(
    start: Tensor, unit: Tensor, rank: int, generator: torch.Generator, error: Tensor | None = None
) -> Adapted:
    """A latent weight with adapters: B starts at zero, A Kaiming-uniform, whose size is in the unit.

    Or they start as the leading singular vectors of an error [O, K], A in the same size, and what they add is taken
    from the weight (MPQ-DMv2's object-oriented initialization, arXiv 2507.04290): B is not zero, so A learns at once.
    """
    unit = unit.mean(1, keepdim=True)
    if error is None:
        down = torch.empty(start.shape[1], rank).uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
        up = torch.zeros(len(start), rank)
    else:
        up, down = (factor.float() for factor in truncated(error / unit, None, rank))
        size = down.square().mean(1).sqrt().clamp_min(F16_TINY)
        up, down = up * size * math.sqrt(len(size)), (down / size[:, None]).T
        start = start - unit * (up @ down.T) / math.sqrt(len(size))
    return Adapted(Kind.LATENT, start, unit, torch.float32, up=up, down=down)


def _timed(table: Variable, embedding: Tensor, generator: torch.Generator) -> Timed:
    """A table of scales with the initial network that produces it."""
    network: list[Tensor] = []
    unit: list[Tensor] = []
    for inputs, outputs in pairwise(WIDTHS):
        network += [torch.randn(outputs * inputs, generator=generator) * math.sqrt(2 / inputs), torch.zeros(outputs)]
        unit += [torch.full((outputs * inputs,), 1 / inputs), torch.ones(outputs)]
    network[-2:] = torch.zeros(WIDTHS[-2]), torch.full((1,), math.log(math.e - 1))  # softplus makes 1 of it
    return Timed(table.kind, table.start, torch.cat(unit), table.dtype, embedding=embedding, network=torch.cat(network))


def _embedding(times: Tensor) -> Tensor:
    """Sinusoidal embeddings [G, WIDTHS[0]] of times [G] from 0 to 1, as diffusion models embed 1000 timesteps."""
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
    """The mean distance of neighbouring entries, over all classes."""
    steps = gaps(table)
    return steps.sum() / steps.gt(0).sum().clamp_min(1)
