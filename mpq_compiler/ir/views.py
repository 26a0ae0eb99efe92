"""Flat, typed views of a program: every operator call, inside regions, too, and the parts of the quantized ones.

The verifier, the printer and the costs read programs through this module, so that a rule or a column is written once
for all stages.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpq_compiler.formats.contract import WeightTables
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import part_of, softmax
from mpq_compiler.ir.program import Program

OPEN_LEVELS = (ops.fake_quantize_weight, ops.fake_quantize_float8)
"""The operators that round a float weight to its nearest levels."""
FLOAT8 = (ops.fake_quantize_float8, ops.dequantize_float8)
"""The operators that compute a weight for a layer in float."""
FACTORS = ("up", "down")
"""The parts of a parameter that are the factors of its low-rank branch."""
LORA_FACTORS = ("lora_up", "lora_down")
"""The parts of a parameter that are the factors of its LoRA branch."""
PACKED_LAYERS = (ops.quant_linear, ops.quant_conv2d)
FLOAT_LAYERS = (aten.linear.default, ops.linear, ops.conv2d)
QUANTIZERS = (ops.fake_quantize, ops.quantize)
DYNAMIC_QUANTIZERS = (ops.dynamic_fake_quantize, ops.dynamic_quantize)
FLOAT_QUANTIZERS = (ops.fake_quantize_float,)
"""The quantizers that are simulated in every stage: layers read the rounded floats."""
FAKE_QUANTIZERS = (ops.fake_quantize, ops.dynamic_fake_quantize, *FLOAT_QUANTIZERS)
"""The quantizers that return rounded floats."""
ATTENTIONS = (ops.fake_quantize_attention, ops.quant_attention)
"""The attentions on quantized operands, simulated and packed."""


@dataclass(frozen=True)
class Call:
    """An operator call; a call inside a region has the region's operands in place of placeholders."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    region: str | None = None


@dataclass(frozen=True)
class Levels:
    """The store names of a quantized weight's parts; it has ``weight`` while its codes are open, then ``codes``."""

    call: Call
    weight: str | None
    codes: str | None
    tables: WeightTables[str | None]

    @property
    def integer(self) -> bool:
        """Whether layers multiply its codes."""
        return self.call.target not in FLOAT8

    @property
    def segments(self) -> int:
        """The number of K-segments, each with scales of their own."""
        return len(self.tables.segments or (1,))

    @property
    def path(self) -> str:
        """The parameter's name in the model."""
        return str(self.codes or self.weight).split(":")[0]


@dataclass(frozen=True)
class Quantizer:
    """A call that quantizes the value of the node ``edge``; scale and zero_point are store names.

    An attention quantizes its probabilities, the edge `graph.softmax`. A dynamic quantizer has neither stored scales
    nor a group.
    """

    call: Call
    edge: str
    scale: str | None
    zero_point: str | None
    group: Any
    bits: int
    exponent: int | None = None
    """The bits of exponent of small floats, which have no zero point; None for integers."""

    @property
    def dynamic(self) -> bool:
        """Whether scale and zero point are computed for each row."""
        return self.call.target in DYNAMIC_QUANTIZERS


@dataclass(frozen=True)
class Layer:
    """A linear or conv2d call on quantized operands, simulated or packed."""

    call: Call
    x: Any
    levels: Levels | None
    group: Any = None
    act_scale: tuple[str | None, ...] = ()
    act_zero: tuple[str | None, ...] = ()
    segments: tuple[int, ...] = ()


def stored(operand: Any) -> str | None:
    """The store name of an operand that is read from the store; None for other operands."""
    return str(operand.target) if isinstance(operand, fx.Node) and operand.op == "get_attr" else None


def flatten(program: Program) -> list[Call]:
    """All operator calls of a program, in the order of execution."""
    found: list[Call] = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            found.append(Call(node.name, node.target, node.args, dict(node.kwargs)))
        elif node.op == "call_module":
            found += inside(program, node)
    return found


def inside(program: Program, node: fx.Node) -> Iterator[Call]:
    """The calls of a region, with the operands of the region's call."""
    region = program.regions[str(node.target)]
    outer = dict(zip((n for n in region.nodes if n.op == "placeholder"), node.args, strict=False))

    def resolve(n: fx.Node) -> Any:
        return outer.get(n, n)

    for inner in region.nodes:
        if inner.op == "call_function":
            args, kwargs = fx.map_arg(inner.args, resolve), fx.map_arg(inner.kwargs, resolve)
            yield Call(inner.name, inner.target, args, dict(kwargs), str(node.target))


def levels_of(calls: Iterable[Call]) -> list[Levels]:
    """The quantized weights, one for each call that computes or reads one."""
    found = []
    for call in calls:
        if call.target in OPEN_LEVELS:
            found.append(Levels(call, stored(call.args[0]), None, _tables(call, 1)))
        elif call.target in (ops.dequantize_weight, ops.dequantize_float8):
            found.append(Levels(call, None, stored(call.args[0]), _tables(call, 1)))
        elif call.target in PACKED_LAYERS:
            found.append(Levels(call, None, stored(call.args[2]), _tables(call, 3)))
    return found


def _tables(call: Call, first: int) -> WeightTables[str | None]:
    """Store names of the tables among the operands of a call, of which the ``first`` is the scale."""
    if call.target in FLOAT8:
        return WeightTables(stored(call.args[first]))
    at = {ops.fake_quantize_weight: 5, ops.dequantize_weight: 6}.get(call.target, 10)
    scale, offset, lut, row_class = (stored(a) for a in call.args[first : first + 4])
    return WeightTables(scale, offset, lut, row_class, call.args[at] if len(call.args) > at else None)


def quantizers_of(calls: Iterable[Call]) -> list[Quantizer]:
    """The quantizers of activations among calls, simulated and packed."""
    found = []
    for call in calls:
        if call.target in QUANTIZERS:
            x, scale, zero, group, bits = call.args
            found.append(Quantizer(call, getattr(x, "name", str(x)), stored(scale), stored(zero), group, bits))
        elif call.target in FLOAT_QUANTIZERS:
            x, scale, group, exponent, bits = call.args
            found.append(Quantizer(call, getattr(x, "name", str(x)), stored(scale), None, group, bits, exponent))
        elif call.target in DYNAMIC_QUANTIZERS:
            found.append(Quantizer(call, getattr(call.args[0], "name", ""), None, None, None, call.args[1]))
        elif call.target in ATTENTIONS:
            scale, zero = call.args[4:6] if call.target is ops.fake_quantize_attention else call.args[10:12]
            edge = softmax(call.name)
            found.append(Quantizer(call, edge, stored(scale), stored(zero), call.args[3], call.args[-1]))
    return found


def made_by(codes: Any) -> Any:
    """The quantizer call behind an operand; a dynamic quantizer has several results, and the codes are the first."""
    return codes.args[0] if isinstance(codes, fx.Node) and codes.target is operator.getitem else codes


def layers_of(calls: Iterable[Call]) -> list[Layer]:
    """The layers on quantized operands; a simulated layer has no segments or scales, which its quantizer has."""
    calls = list(calls)
    weights = {levels.call.name: levels for levels in levels_of(calls)}
    found = []
    for call in calls:
        if call.target in PACKED_LAYERS:
            x, group = call.args[:2]
            scales, zeros, _, segments = call.args[7:11]
            tables = tuple(map(stored, scales)), tuple(map(stored, zeros))
            found.append(Layer(call, x, weights[call.name], group, *tables, tuple(segments)))
        elif call.target in FLOAT_LAYERS and stored(call.args[1]) is None:
            found.append(Layer(call, call.args[0], _made_by(call.args[1], weights)))
    return found


def _made_by(weight: Any, levels: dict[str, Levels]) -> Levels | None:
    """The levels of a weight operand, or of its base where a branch is added to it."""
    if isinstance(weight, fx.Node) and weight.target is aten.add.Tensor:
        weight = weight.args[0]
    return levels.get(weight.name) if isinstance(weight, fx.Node) else None


def weight_path(call: Call, levels: dict[str, Levels]) -> str | None:
    """The parameter by which a layer multiplies, in any stage; None where its weight is computed.

    A factor of a branch has its own store name. levels: from `levels_of`, by call name.
    """
    if call.target in PACKED_LAYERS:
        return levels[call.name].path
    if call.target not in FLOAT_LAYERS:
        return None
    name = stored(call.args[1])
    if name is not None:
        return name if factor(name) or lora_factor(name) else name.split(":")[0]
    made = _made_by(call.args[1], levels)
    return made.path if made else None


def factor(name: str) -> str | None:
    """The one of `FACTORS` that a store name is; None for any other tensor."""
    part = part_of(name)
    return part if part in FACTORS else None


def lora_factor(name: str) -> str | None:
    """The one of `LORA_FACTORS` that a store name is; None for any other tensor."""
    part = part_of(name)
    return part if part in LORA_FACTORS else None


def is_aten(target: Any) -> bool:
    """Whether a target is an aten operator."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
