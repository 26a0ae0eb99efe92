"""Emits quantizers, and layers on codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from mpq_compiler.backends.tvm.emit import pointwise
from mpq_compiler.backends.tvm.emit.emitter import Emitter, Epilogue, Formula, type_name
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import MANY_ROWS, QuantMatmul
from mpq_compiler.backends.tvm.plan.calls import BATCH, Kernel, Value, record
from mpq_compiler.formats import contract
from mpq_compiler.ir import ops, stored_tensors
from mpq_compiler.ir.graph import arguments


def time_group(e: Emitter, node: fx.Node) -> Value:
    """Emits the time group of every sample, i64 [B]."""
    timestep, boundaries = e.value(node.args[0]), e.stored(node.args[1])
    out = Value(node.name, (BATCH,), "int64")
    if not boundaries.size:
        fill = record("movement.Movement", inputs=(), shape=(BATCH,), copies=(), dtype="int64", fill=0)
        return e.call(Kernel("movement", fill), {}, {"y": out})[0]
    problem = record("quantize.TimeGroup", groups=boundaries.size + 1, dtype=timestep.dtype)
    operands = {"timestep": timestep, "boundaries": boundaries}
    return e.call(Kernel("quantize", problem), operands, {"out": out})[0]


def quantize(e: Emitter, node: fx.Node) -> Value:
    """Emits a static quantizer to u8 codes."""
    x, quantizer, bits = e.value(node.args[0]), e.quantizer(node), arguments(node)[4]
    if not x.batched or x.dtype != "float32":
        raise e.refusal("it quantizes what has no batch or is no float32")
    if not e.view(x).is_whole:
        formula = Formula(x.shape)
        formula.step("quantize", formula.read(x), value=bits)
        return pointwise.run(e, formula, quantizer, node.name)
    problem = record("quantize.Quantize", shape=(x.size,), bits=bits, groups=quantizer["qscale"].size)
    out = Value(node.name, x.shape, "uint8")
    return e.call(Kernel("quantize", problem), {"x": x, **quantizer}, {"out": out})[0]


def dynamic_quantize(e: Emitter, node: fx.Node) -> list[Value]:
    """Emits a dynamic quantizer: codes, and scale and zero point of every row."""
    x, bits = e.value(node.args[0]), arguments(node)[1]
    if not x.batched or x.dtype != "float32":
        raise e.refusal("it quantizes what has no batch or is no float32")
    width = e.two[node.name][0].shape[-1]
    problem = record("quantize.DynamicQuantize", rows=x.size // width, width=width, bits=bits)
    readers = {arguments(user)[1]: user.name for user in node.users}
    parts = zip(e.two[node.name], e.three[node.name], strict=True)
    values = [
        Value(readers.get(i, f"{node.name}|{i}"), e.shape_of(two, three), type_name(two.dtype))
        for i, (two, three) in enumerate(parts)
    ]
    return e.call(Kernel("quantize", problem), {"x": x}, dict(zip(("out", "scale", "zero"), values, strict=True)))


def fake_quantize_float(e: Emitter, node: fx.Node) -> Value:
    """Emits a quantizer to small floats: `contract.round_float` between a division and a product, step by step."""
    x_node, table, group, exponent, bits = arguments(node)
    x, scale = e.value(x_node), e.converted(e.stored(table), "float32")
    if not x.batched or x.dtype != "float32":
        raise e.refusal("it quantizes what has no batch or is no float32")
    if scale.size > 1:
        index, rows = e.value(group), scale.size
        gather = record(
            "movement.Gather", rows=rows, width=1, positions=index.inner, dtype="float32", index_dtype=index.dtype
        )
        out = Value(f"{node.name}|scale", (BATCH,), "float32")
        scale = e.call(Kernel("movement", gather), {"index": index, "table": scale}, {"y": out})[0]
    largest, formula = contract.float_largest(exponent, bits), Formula(x.shape)
    s = formula.read(scale)
    t = formula.step("div", formula.read(x), s)
    t = formula.step("minimum", formula.step("maximum", t, -largest), largest)
    power = formula.step("maximum", formula.step("binade", t), 2.0 ** (1 - contract.float_bias(exponent)))
    c = formula.step("mul", power, 1.5 * 2.0 ** (24 + exponent - bits))
    formula.step("mul", formula.step("sub", formula.step("add", t, c), c), s)
    return pointwise.run(e, formula, {}, node.name)


def dequantize_weight(e: Emitter, node: fx.Node) -> Value:
    """Emits the dequantization of a weight of a float layer; the weight is stored, so the call goes to `prepare`."""
    codes, scale, offset, lut, row_class, shape, *segments = arguments(node)
    parts = {"codes": codes, "scale": scale, "offset": offset, "tables": lut, "row_class": row_class}
    stored = {name: _restored(e, e.stored(part)) for name, part in parts.items() if part is not None}
    rows, columns = stored["scale"].inner[0], math.prod(shape[1:])
    tables = stored["tables"] if lut is not None else None
    problem = record(
        "dequantize.DequantizeTable", rows=rows, columns=columns, segments=tuple((segments or [shape[-1:]])[0]),
        bits=stored_tensors.code_bits(e.program, tables.name if tables else None),
        classes=tables.inner[0] if tables else 1,
        offset=stored["offset"].dtype if offset is not None else None, **_widths(e, stored),
    )  # fmt: skip
    out = Value(node.name, tuple(shape), "float32")
    return e.call(Kernel("dequantize", problem), stored, {"y": out})[0]


def _restored(e: Emitter, value: Value) -> Value:
    """A stored tensor as kernels take it: coded ones are decoded in `prepare`."""
    tensor = e.preparation.stored[value.name]
    if tensor.coding is None or tensor.shape is None:
        return value
    if tensor.coding == stored_tensors.REPEATED:
        problem = record("movement.expand", shape=value.shape, target=tensor.shape, dtype=value.dtype)
        out = Value(f"{value.name}|rows", tensor.shape, value.dtype)
        return e.call(Kernel("movement", problem), {"x0": value}, {"y": out})[0]
    count, bits = math.prod(tensor.shape), tensor.bits or 8
    problem = record("rans.DecodeRans", count=count, size=value.size, bits=bits)
    out = Value(f"{value.name}|decoded", (-(-count * bits // 8),), "uint8")
    return e.call(Kernel("rans", problem), {"coded": value}, {"codes": out})[0]


def _widths(e: Emitter, stored: dict[str, Value]) -> dict[str, Any]:
    """The parts of a problem that describe stored codes whose bits differ by row; empty where they do not."""
    lut = stored["tables"].name if "tables" in stored else None
    if not stored_tensors.several_widths(e.program, lut):
        return {}
    return {"widths": stored_tensors.class_bits(e.program, lut), "code_bytes": stored["codes"].size}


def dequantize_float8(e: Emitter, node: fx.Node) -> Value:
    """Emits the dequantization of an FP8 weight; codes and scales are stored, so the call goes to `prepare`."""
    codes, scale = (e.stored(a) for a in arguments(node)[:2])
    _, _, shape, exponent = arguments(node)
    rows, columns = codes.inner
    problem = record("float8.DequantizeFloat8", rows=rows, columns=columns, exponent=exponent)
    out = Value(node.name, tuple(shape), "float32")
    return e.call(Kernel("float8", problem), {"codes": codes, "scale": scale}, {"y": out})[0]


def quant_attention(e: Emitter, node: fx.Node) -> Value:
    """Raises a UserError: there is no kernel for quantized attention."""
    raise e.refusal(
        "quantized attention has no CPU kernel yet, the targets reference and onnx run it; leave attentions in float "
        "with bit-allocation{attention=none}"
    )


def _stacked(e: Emitter, nodes: Sequence[Any], convert: str | None) -> Value:
    """Stacks stored tables [G], one for each segment, to one [J, G]."""
    values = [e.stored(n) for n in nodes]
    if convert:
        values = [e.converted(v, convert) for v in values]
    first, count = values[0], len(values)
    if count == 1:
        return first
    if len(set(values)) == 1:  # K-groups: one table for all segments
        problem = record("movement.expand", shape=(1, first.size), target=(count, first.size), dtype=first.dtype)
        out = Value(f"{first.name}*{count}", (count, first.size), first.dtype)
        return e.call(Kernel("movement", problem), {"x0": first}, {"y": out})[0]
    problem = record("movement.concat", shapes=[v.shape for v in values], dim=0, dtype=values[0].dtype)
    out = Value("+".join(v.name for v in values), (sum(v.size for v in values),), values[0].dtype)
    operands = {f"x{i}": v for i, v in enumerate(values)}
    return e.call(Kernel("movement", problem), operands, {"y": out})[0]


def _layout_rows(rows: int) -> int:
    """The least rows a sample for which weights lie as for so many, so that layers share what `prepare` makes."""
    return MANY_ROWS if rows >= MANY_ROWS else 1


def contraction(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    """Emits a linear layer or convolution on codes with its epilogue; its weight is packed in `prepare`."""
    x, group, codes, scale, offset, lut, row_class, act_scale, act_zero, bias, segments, *spatial = arguments(node)
    source = e.value(x)
    parts = {"codes": codes, "scale": scale, "stored_offset": offset, "tables": lut, "row_class": row_class}
    parts["stored_bias"] = bias
    stored = {name: _restored(e, e.stored(part)) for name, part in parts.items() if part is not None}
    widths = _widths(e, stored)
    dynamic = group is None  # the tables are those of the rows, the same for all segments
    if not dynamic:
        stored["act_zero"] = _stacked(e, act_zero, None)
    bits = stored_tensors.code_bits(e.program, stored["tables"].name if "tables" in stored else None)
    if widths and bits > 4:
        bits = 8  # of more entries than a kernel shuffles: in memory codes are the values
    if "tables" in stored and "row_class" not in stored:
        blocks = -(-stored["scale"].inner[0] // contract.TILE_ROWS)
        stored["row_class"] = e.constant((blocks,), "uint8", 0)  # one table for all rows
    if "stored_bias" in stored and stored["stored_bias"].dtype != "float16":
        raise e.refusal("its bias exceeds the range of half-precision floats")
    channels = source.inner[-1]
    shared: dict[str, Any] = {
        "channels": channels,
        "outputs": stored["scale"].inner[0],
        "bits": bits,
        "classes": stored["tables"].inner[0] if bits < 8 and not widths else 1,  # one table holds those of all widths
        "segments": tuple(segments),
        "groups": 1 if dynamic else e.stored(act_scale[0]).size,
        "dynamic": dynamic,
        "has_offset": "stored_offset" in stored,
        "has_bias": "stored_bias" in stored,
    }
    if node.target is ops.quant_conv2d:
        if len(source.inner) != 3:
            raise e.refusal("its input is no image [B, H, W, C]")
        kernel, stride, padding = spatial
        problem = record(
            "problem.QuantMatmul", height=source.inner[0], width=source.inner[1], kernel=kernel, stride=stride,
            padding=padding, epilogue=epilogue.record, **shared,
        )  # fmt: skip
        image = QuantMatmul(*source.inner, shared["outputs"], kernel, stride, padding)
        height = kernel[0] - 1 + _layout_rows(image.rows)
        prepare = record("problem.QuantMatmul", height=height, width=kernel[1], kernel=kernel, **shared | widths)
    else:
        rows = source.size // channels
        rank = 2 if rows == 1 else 3
        problem = record("problem.QuantMatmul", height=rows, width=1, rank=rank, epilogue=epilogue.record, **shared)
        prepare = record("problem.QuantMatmul", height=_layout_rows(rows), width=1, **shared | widths)
        if dynamic:
            problem = problem.replace(groups=pointwise.groups(e, epilogue))
    names = ["tiles", "lut", "start", "weight_scale", "sums", "offset", "bias"]
    late = dynamic and len(shared["segments"]) > ops.FEW_SEGMENTS
    absent = {"lut": bits == 8, "sums": not late, "offset": not shared["has_offset"], "bias": not shared["has_bias"]}
    results = {n: Value(f"{node.name}|{n}", (), "") for n in names if not absent.get(n)}
    panels = e.call(Kernel("prepare", prepare), stored, results)
    if dynamic:
        tables = {"act_scale": e.value(act_scale[0]), "act_zero": e.value(act_zero[0])}
    else:
        tables = {"act_scale": _stacked(e, act_scale, "float32"), "act_zero": stored["act_zero"]}
        tables["group"] = e.value(group)
    operands = {
        "x": source,
        **tables,
        **dict(zip(results, panels, strict=True)),
        **pointwise.finish(e, epilogue),
    }
    return e.call(Kernel("gemm", problem), operands, {"out": out})[0]
