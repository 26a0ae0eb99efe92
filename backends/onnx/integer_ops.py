"""Emits quantizers, and layers on codes.

A layer is DequantizeLinear of codes and of int8 weights, and a MatMul, which onnxruntime fuses to one integer kernel
(MatMulIntegerToFloat). A convolution is the same product over gathered taps. ONNX's integer convolution without a
quantizer behind it, ConvInteger, takes 15 times as long, and Conv on dequantized operands computes in floats.

With one time group, scale and zero point are constants. With several they differ from sample to sample, but the kernel
takes one number: onnxruntime 1.31 fuses DequantizeLinear along axis 0 all the same, and fails at batch 2. So the codes
are dequantized with scale 1 and a zero point m in the middle of all groups'. The rest of
``y = sum_k s[b] (q - z[b]) w`` follows the product: a factor s[b], and the row of a table [G, O] of
``bias - s (z - m) sum_k w``, which onnxruntime computes when it loads the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx

from mpq_compiler.backends.onnx.emitter import Emitter, Emitters, Made, Shape, Value
from mpq_compiler.backends.onnx.float_ops import join_heads, split_heads
from mpq_compiler.backends.onnx.graph import ELEMENT
from mpq_compiler.formats import contract
from mpq_compiler.ir import ops

Arguments = dict[str, Any]
EMITTERS = Emitters()


@EMITTERS.emits(ops.time_group)
def _time_group(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g = e.graph
    if not e.array(a["boundaries"]).size:
        return g.op("ConstantOfShape", e.batch(), value=_tensor(0, "int64"), name=node.name)
    timestep = e.cast(e.last(a["timestep"]), e.dtype(a["timestep"]), "float32")
    passed = g.op("GreaterOrEqual", g.op("Reshape", timestep, g.ints(-1, 1)), e.last(a["boundaries"]))
    return g.op("ReduceSum", g.op("Cast", passed, to=ELEMENT["int64"]), g.ints(1), keepdims=0, name=node.name)


# --- tables -----------------------------------------------------------------------------------------------------


def _tensor(value: int, dtype: str) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray([value], dtype))


def _single(e: Emitter, table: fx.Node) -> bool:
    """Whether a table is stored and has one entry."""
    return e.resolve(table).op == "get_attr" and e.array(table).size == 1


def _middle(e: Emitter, zero: fx.Node) -> int:
    """A zero point in the middle of a table's, which keeps products of codes small."""
    return round(float(e.array(zero).mean())) if e.resolve(zero).op == "get_attr" else 128


def _scalar(e: Emitter, table: fx.Node) -> str:
    """The only entry of a table [1], as a scalar."""
    return e.graph.op("Reshape", e.last(table), e.graph.constant([], "int64", "scalar"))


def _chosen(e: Emitter, table: str, group: fx.Node, shape: Shape) -> str:
    """Gathers the entry of a table [G, ...] for each row of a tensor of ``shape`` [R, ...]: a tensor [R, ...]."""
    g, rows, index = e.graph, -shape[0], e.last(group)
    if rows > 1:
        index = g.op("Reshape", g.op("Expand", g.op("Reshape", index, g.ints(-1, 1)), g.ints(1, rows)), g.ints(-1))
    return g.op("Gather", table, index)


def _spread(e: Emitter, table: fx.Node, group: fx.Node | None, shape: Shape) -> str:
    """Gathers a table's entries for the rows of a tensor of ``shape``, so that they broadcast over it.

    Without a group the table already has an entry for each row.
    """
    if group is None:
        return e.reshaped(e.last(table), (*shape[:-1], 1))
    return _chosen(e, e.reshaped(e.last(table), (-1, *[1] * (len(shape) - 1))), group, shape)


# --- quantizers -------------------------------------------------------------------------------------------------


def quantized(
    e: Emitter, x: str, shape: Shape, scale: fx.Node, zero: fx.Node, group: fx.Node, bits: int, name: str | None = None
) -> str:
    """Quantizes x, of ``shape`` in the program, to codes; its channels may be in either order.

    Args:
        e: the emitter.
        x: the value.
        shape: of the program's tensor.
        scale: the scales [G].
        zero: the zero points [G].
        group: the time group of each sample.
        bits: of a code.
        name: of the result.
    """
    if _single(e, scale):
        tables, axis = [_scalar(e, scale), _scalar(e, zero)], {}
    else:
        tables, axis = [_chosen(e, e.last(table), group, shape) for table in (scale, zero)], {"axis": 0}
    return _limited(e, bits, x, *tables, name=name, **axis)


def _limited(e: Emitter, bits: int, *operands: str, name: str | None, **axis: int) -> str:
    """Quantizes to codes below 2^bits."""
    if bits == 8:
        return e.graph.op("QuantizeLinear", *operands, name=name, **axis)
    codes = e.graph.op("QuantizeLinear", *operands, name=None, **axis)
    return e.graph.op("Clip", codes, "", e.graph.constant(2**bits - 1, "uint8"), name=name)


@EMITTERS.emits(ops.quantize)
def _quantize(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    x, tables = e.value(a["x"]), (a["scale"], a["zero_point"], a["group"])
    return Value(quantized(e, x.name, e.shape(node), *tables, a["bits"], node.name), x.first)


@EMITTERS.emits(ops.dynamic_quantize)
def _dynamic_quantize(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    """Emits a dynamic quantizer, with scale and zero point of each row as `ops.row_ranges` defines them."""
    g, zero, largest = e.graph, e.number(0.0), e.number(2.0 ** a["bits"] - 1)
    codes = e.shapes(node)[0]
    rows = g.op("Reshape", e.last(a["x"]), g.ints(-1, codes[-1]))
    low = g.op("Min", g.op("ReduceMin", rows, g.ints(1), keepdims=0), zero)
    high = g.op("Max", g.op("ReduceMax", rows, g.ints(1), keepdims=0), zero)
    s = g.op("Max", g.op("Div", g.op("Sub", high, low), largest), e.number(ops.SMALLEST_SCALE))
    z = g.op("Clip", g.op("Round", g.op("Div", g.op("Neg", low), s)), zero, largest)
    z = g.op("Cast", z, to=ELEMENT["uint8"])
    q = _limited(e, a["bits"], rows, s, z, name=None, axis=0)
    return [Value(e.reshaped(q, codes, node.name)), Value(s), Value(z)]


@EMITTERS.emits(ops.fake_quantize_float)
def _fake_quantize_float(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    """Emits `contract.round_float`, with the power of two by a logarithm that is corrected near whole numbers."""
    g, x, shape = e.graph, e.value(a["x"]), e.shape(node)
    exponent, bits = a["exponent"], a["bits"]
    largest, smallest = contract.float_largest(exponent, bits), 2.0 ** (1 - contract.float_bias(exponent))
    scale = _scalar(e, a["scale"]) if _single(e, a["scale"]) else _spread(e, a["scale"], a["group"], shape)
    t = g.op("Clip", g.op("Div", x.name, scale), e.number(-largest), e.number(largest))
    magnitude = g.op("Max", g.op("Abs", t), e.number(smallest))
    power = g.op("Pow", e.number(2.0), g.op("Floor", g.op("Mul", g.op("Log", magnitude), e.number(1.4426950408889634))))
    power = g.op("Where", g.op("Greater", power, magnitude), g.op("Mul", power, e.number(0.5)), power)
    double = g.op("Mul", power, e.number(2.0))
    power = g.op("Where", g.op("LessOrEqual", double, magnitude), double, power)
    c = g.op("Mul", power, e.number(1.5 * 2.0 ** (24 + exponent - bits)))
    rounded = g.op("Sub", g.op("Add", t, c), c)
    return Value(g.op("Mul", rounded, scale, name=node.name), x.first)


# --- weights ----------------------------------------------------------------------------------------------------


@EMITTERS.emits(ops.dequantize_weight)
def _dequantize_weight(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g, columns = e.graph, e.example(a["codes"]).shape[1]
    levels, zero = _levels(e, a)
    value = g.op("Sub", g.op("Cast", levels, to=ELEMENT["float32"]), e.number(float(zero)))
    segment = contract.column_segments(a["segments"] or [columns], columns).numpy()
    index = g.constant(segment if segment.any() else segment[:1], "int64", f"{node.name}/segments")
    value = g.op("Mul", value, g.op("Gather", e.last(a["scale"]), index, axis=1))
    if a["offset"] is not None:
        value = g.op("Add", value, g.op("Reshape", e.last(a["offset"]), g.ints(-1, 1)))
    return e.reshaped(value, e.shape(node), node.name)


@EMITTERS.emits(ops.dequantize_float8)
def _dequantize_float8(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    g, every = e.graph, torch.arange(256, dtype=torch.uint8)
    values = ops.dequantize_float8(every[None], torch.ones(1), (256,), a["exponent"]).numpy()
    index = g.op("Cast", e.weights.raw(e.stored(a["codes"])), to=ELEMENT["int32"])
    value = g.op("Gather", g.constant(values, "float32", f"float8e{a['exponent']}"), index)
    value = g.op("Mul", value, g.op("Reshape", e.last(a["scale"]), g.ints(-1, 1)))
    return e.reshaped(value, e.shape(node), node.name)


def _levels(e: Emitter, a: Arguments) -> tuple[str, int]:
    """The integer levels of a weight (`Weights.levels`)."""
    codes, lut, row_class = (None if a[k] is None else e.stored(a[k]) for k in ("codes", "lut", "row_class"))
    assert codes is not None
    return e.weights.levels(codes, lut, row_class)


@dataclass(frozen=True)
class _Weight:
    """A segment of a weight: i8 [K, O] minus zero, times f32 scale [O]."""

    levels: str
    zero: int
    scale: str
    columns: int
    outputs: int

    def dequantized(self, e: Emitter) -> str:
        """Dequantizes the segment, f32 [K, O]."""
        zeros = [e.graph.constant(np.full(self.outputs, self.zero), "int8", f"i8:{self.zero}x{self.outputs}")]
        return e.graph.op("DequantizeLinear", self.levels, self.scale, *(zeros if self.zero else []), axis=1)

    def sums(self, e: Emitter) -> str:
        """Sums the dequantized segment over K, f32 [O]."""
        g = e.graph
        total = g.op("ReduceSum", g.op("Cast", self.levels, to=ELEMENT["float32"]), g.ints(0), keepdims=0)
        if self.zero:
            total = g.op("Sub", total, e.number(float(self.zero * self.columns)))
        return g.op("Mul", total, self.scale)


def _segments(e: Emitter, a: Arguments, taps: int) -> list[_Weight]:
    """Splits a weight into its segments; channels are split alike at every tap."""
    g, (outputs, columns) = e.graph, e.example(a["codes"]).shape
    levels, zero = _levels(e, a)
    found, begin = [], 0
    for j, size in enumerate(a["segments"]):
        part = levels
        if taps * size != columns:
            spread = g.op("Reshape", levels, g.ints(outputs, taps, columns // taps))
            part = g.op("Slice", spread, g.ints(begin), g.ints(begin + size), g.ints(2))
            part = g.op("Reshape", part, g.ints(outputs, taps * size))
        scale = g.op("Gather", e.last(a["scale"]), g.constant(j, "int64"), axis=1)
        found.append(_Weight(g.op("Transpose", part, perm=[1, 0]), zero, scale, taps * size, outputs))
        begin += size
    return found


# --- layers -----------------------------------------------------------------------------------------------------


@EMITTERS.emits(ops.quant_linear)
def _quant_linear(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    parts = _channels(e, e.last(a["x"]), a["segments"])
    return _contraction(e, a, parts, _segments(e, a, 1), e.shape(node), node.name)


def _channels(e: Emitter, x: str, segments: list[int]) -> list[str]:
    """Splits x [..., K] by the segments of its channels."""
    if len(segments) == 1:
        return [x]
    return e.graph.ops("Split", len(segments), x, e.graph.ints(*segments), axis=-1)


@EMITTERS.emits(ops.quant_conv2d)
def _quant_conv2d(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    """Emits a convolution: a Gather collects the taps of each row from the pixels.

    A further pixel behind them holds the zero point, for padding.
    """
    g, shape = e.graph, e.shape(node)
    batch, height, width, _ = e.shape(a["x"])
    geometry = (a["kernel"], a["stride"], a["padding"])
    taps, padded = _taps(height, width, *geometry)
    parts = _channels(e, e.last(a["x"]), a["segments"])
    if taps.shape != (height, width, 1):
        text = "/".join(",".join(map(str, part)) for part in geometry)
        index = g.constant(taps, "int32", f"taps:{height},{width}/{text}")
        for j, (size, zero) in enumerate(zip(a["segments"], a["act_zero"], strict=True)):
            pixels = g.op("Reshape", parts[j], g.ints(-1, height * width, size))
            if padded:
                table = g.op("Expand", g.op("Reshape", e.last(zero), g.ints(-1, 1, 1)), g.ints(1, 1, size))
                pixels = g.op("Concat", pixels, _chosen(e, table, a["group"], (batch,)), axis=1)
            rows = g.op("Gather", pixels, index, axis=1)
            parts[j] = g.op("Reshape", rows, g.ints(-1, *taps.shape[:2], taps.shape[2] * size))
    return _contraction(e, a, parts, _segments(e, a, taps.shape[2]), shape, node.name)


def _taps(height: int, width: int, kernel: Any, stride: Any, padding: Any) -> tuple[np.ndarray, bool]:
    """The pixel under each tap, [OH, OW, taps], and whether some are padding, which has the number height*width."""
    top, bottom, left, right = padding
    pixels = np.full((top + height + bottom, left + width + right), height * width)
    pixels[top : top + height, left : left + width] = np.arange(height * width).reshape(height, width)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, tuple(kernel))[:: stride[0], :: stride[1]]
    taps = windows.reshape(*windows.shape[:2], -1)
    return taps, bool((taps == height * width).any())


def _contraction(
    e: Emitter, a: Arguments, parts: list[str], weights: list[_Weight], shape: Shape, name: str | None = None
) -> str:
    """Emits the product of codes and weight, y of ``shape`` [..., O].

    Args:
        e: the emitter.
        a: the arguments of the layer.
        parts: the codes [..., K_j] of each segment.
        weights: the weight of each segment.
        shape: of y.
        name: of y.
    """
    g, constant = e.graph, all(_single(e, table) for table in a["act_scale"])
    offset = None if a["offset"] is None else e.last(a["offset"])
    bias = None if a["bias"] is None else e.last(a["bias"])
    tables: dict[Any, list[tuple[str, _Weight]]] = {}
    for codes, weight, *table in zip(parts, weights, a["act_scale"], a["act_zero"], strict=True):
        tables.setdefault(tuple(map(e.resolve, table)), []).append((codes, weight))
    terms = []
    for (scale, zero), members in tables.items():
        x_scale, x_zero = e.number(1.0), e.number(_middle(e, zero), "uint8")
        if constant:
            x_scale, x_zero = _scalar(e, scale), _scalar(e, zero)
        products = []
        for codes, weight in members:
            x = g.op("DequantizeLinear", codes, x_scale, x_zero)
            products.append(g.op("MatMul", x, weight.dequantized(e)))
            if offset is not None:
                products.append(g.op("Mul", g.op("MatMul", x, _ones(e, weight.columns)), offset))
        y = _sum(e, products)
        terms.append(y if constant else g.op("Mul", y, _spread(e, scale, a["group"], shape)))
    rest = bias if constant else _rest(e, a["group"], tables, offset, bias, shape)
    return _sum(e, terms if rest is None else [*terms, rest], name)


def _sum(e: Emitter, terms: list[str], name: str | None = None) -> str:
    """Sums terms by Sum: behind Add onnxruntime makes a two-dimensional MatMul a Gemm, which no integer kernel runs."""
    return terms[0] if len(terms) == 1 else e.graph.op("Sum", *terms, name=name)


def _ones(e: Emitter, columns: int) -> str:
    """A column of ones in the form of a weight, f32 [K, 1], so that sums of codes are integer products, too."""
    ones = e.graph.op("ConstantOfShape", e.graph.ints(columns, 1), value=_tensor(1, "int8"))
    return e.graph.op("DequantizeLinear", ones, e.graph.constant([1.0], "float32"), axis=1)


def _rest(
    e: Emitter,
    group: fx.Node | None,
    tables: dict[Any, list[tuple[str, _Weight]]],
    offset: str | None,
    bias: str | None,
    shape: Shape,
) -> str:
    """The rest of y besides products of codes, ``bias - sum_j s_j (z_j - m_j) sum_k w_jk``, to broadcast over it."""
    g, terms = e.graph, []
    for (scale, zero), members in tables.items():
        sums = [weight.sums(e) for _, weight in members]
        if offset is not None:
            sums.append(g.op("Mul", offset, e.number(float(sum(weight.columns for _, weight in members)))))
        distance = g.op("Sub", g.op("Cast", e.last(zero), to=ELEMENT["float32"]), e.number(float(_middle(e, zero))))
        shift = g.op("Mul", e.last(scale), distance)
        terms.append(g.op("Mul", g.op("Reshape", shift, g.ints(-1, 1)), _sum(e, sums)))
    total = _sum(e, terms)
    total = g.op("Neg", total) if bias is None else g.op("Sub", bias, total)
    if group is None:
        return e.reshaped(total, shape)
    return _chosen(e, e.reshaped(total, (-1, *[1] * (len(shape) - 2), shape[-1])), group, shape)


# --- attention --------------------------------------------------------------------------------------------------


@EMITTERS.emits(ops.quant_attention)
def _quant_attention(e: Emitter, node: fx.Node, a: Arguments) -> Made:
    """Emits a quantized attention on codes converted to floats.

    onnxruntime's integer products of two activations take one zero point for all samples.
    """
    g, heads, group = e.graph, a["heads"], a["group"]
    e.program.fallbacks.setdefault(node.name, "its products of codes are computed in float32 by onnxruntime")
    centred, scales = {}, {}
    for x in "qkv":
        shape = e.shape(a[x])
        z = _spread(e, a[f"{x}_zero"], group, shape)
        codes, z = (g.op("Cast", v, to=ELEMENT["float32"]) for v in (e.last(a[x]), z))
        centred[x] = split_heads(e, g.op("Sub", codes, z), shape[-1], heads, transposed=x == "k")
        scales[x] = _spread(e, a[f"{x}_scale"], group, (shape[0], 1, 1, 1))
    width = e.shape(a["q"])[-1] // heads
    scale = e.number(width**-0.5 if a["scale"] is None else a["scale"])
    factor = g.op("Mul", g.op("Mul", scales["q"], scales["k"]), scale)
    logits = g.op("Mul", g.op("MatMul", centred["q"], centred["k"]), factor)
    if a["mask"] is not None:
        logits = g.op("Add", logits, e.last(a["mask"]))
    p_shape = (e.shape(a["q"])[0], 1, 1, 1)
    p = quantized(e, g.op("Softmax", logits, axis=-1), p_shape, a["p_scale"], a["p_zero"], group, a["bits"])
    p_zero = g.op("Cast", _spread(e, a["p_zero"], group, p_shape), to=ELEMENT["float32"])
    p = g.op("Sub", g.op("Cast", p, to=ELEMENT["float32"]), p_zero)
    factor = g.op("Mul", _spread(e, a["p_scale"], group, p_shape), scales["v"])
    return join_heads(e, node, g.op("Mul", g.op("MatMul", p, centred["v"]), factor))
