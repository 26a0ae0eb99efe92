"""Exact mode: executes a fake-quantized program on codes, as the packed program that it folds to will run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.formats import contract
from mpq_compiler.formats.contract import WeightTables
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import Program


@dataclass(frozen=True)
class Codes:
    """The result of a quantizer; without a group, scale and zero point are per row."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group: Tensor | None

    def value(self) -> Tensor:
        """The values that the codes stand for, f32."""
        scale = ops.per_sample(self.scale.to(torch.float32), self.group, self.codes)
        zero = ops.per_sample(self.zero_point.to(torch.float32), self.group, self.codes)
        return (self.codes.to(torch.float32) - zero) * scale


@dataclass(frozen=True)
class WeightCodes:
    """The result of quantizing a weight; ``shape`` is the float weight's."""

    codes: Tensor
    tables: WeightTables[Tensor]
    shape: tuple[int, ...]

    def value(self) -> Tensor:
        return contract.dequantize(self.codes, self.tables).reshape(self.shape)


@dataclass(frozen=True)
class BranchCodes:
    """The binary branch of a residual weight, in parts."""

    signs: Tensor
    scale: Tensor
    alpha: Tensor
    shape: tuple[int, ...]

    def value(self) -> Tensor:
        return ops.binary_branch(self.signs, self.scale, self.alpha, self.shape)


class ExactInterpreter(Interpreter):
    """Accumulates integers, and applies the exact epilogue, wherever a layer reads quantized operands."""

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target = node.target
        if target is ops.fake_quantize:
            x, scale, zero, group, bits = args
            return Codes(ops.quantize(_plain(x), scale, zero, group, bits), scale, zero, group)
        if target is ops.dynamic_fake_quantize:
            return Codes(*ops.dynamic_quantize(_plain(args[0]), args[1]), None)
        if target is ops.fake_quantize_attention:
            return _attend(*args)
        if target is ops.dequantize_weight:
            codes, scale, offset, lut, row_class, shape, *segments = args
            return WeightCodes(codes, WeightTables(scale, offset, lut, row_class, *segments), tuple(shape))
        if target is ops.fake_quantize_weight:
            weight, *parts = args
            tables: WeightTables[Tensor] = WeightTables(*parts)
            codes = contract.quantize(weight.reshape(len(weight), -1), tables)
            return WeightCodes(codes, tables, tuple(weight.shape))
        if target is ops.binary_branch:
            return BranchCodes(args[0], args[1], args[2], tuple(args[3]))
        if target is aten.add.Tensor and isinstance(args[0], WeightCodes) and isinstance(args[1], BranchCodes):
            base, branch = args
            assert base.tables.lut is not None
            codes, lut = contract.merge_branch(base.codes, base.tables.lut, branch.signs, branch.alpha)
            return dataclasses.replace(base, codes=codes, tables=base.tables._replace(lut=lut))
        if len(args) > 1 and isinstance(args[0], Codes) and isinstance(args[1], WeightCodes):
            return _contract(target, *args, **kwargs)
        return super().call(node, fx.node.map_aggregate(args, _plain), fx.node.map_aggregate(kwargs, _plain))

    def result(self, value: Any) -> Any:
        return _plain(value)


def _plain(value: Any) -> Any:
    return value.value() if isinstance(value, Codes | WeightCodes | BranchCodes) else value


def _contract(
    target: Any,
    x: Codes,
    w: WeightCodes,
    bias: Tensor | None = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0, 0, 0),
    groups: int = 1,
) -> Tensor:
    channels = list(w.tables.segments or x.codes.shape[-1:])
    scales, zeros = [x.scale] * len(channels), [x.zero_point] * len(channels)
    operands: tuple[Any, ...] = (x.codes, x.group, w.codes, *w.tables.operands, scales, zeros, bias, channels)
    if target is ops.conv2d:
        assert groups == 1
        operands = (*operands, list(w.shape[1:3]), stride, padding)
        return ops.quant_conv2d(*operands)
    return ops.quant_linear(*operands)


def _attend(q: Codes, k: Codes, v: Codes, group: Tensor, p_scale: Tensor, p_zero: Tensor, *rest: Any) -> Tensor:
    tables = [t for x in (q, k, v) for t in (x.scale, x.zero_point)]
    operands: tuple[Any, ...] = (q.codes, k.codes, v.codes, group, *tables, p_scale, p_zero, *rest)
    return ops.quant_attention(*operands)


@torch.no_grad()
def run_exact(
    program: Program, inputs: Mapping[str, Tensor], watch: Callable[[fx.Node, Any], None] | None = None
) -> Tensor:
    """Runs a program in exact mode."""
    return ExactInterpreter(program).run(inputs, watch=watch)
