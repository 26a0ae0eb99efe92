"""Exact mode and the packed dialect against plain f64 arithmetic of the formulas, written independently."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mpq_compiler.ir import exact_interpreter, ops
from mpq_compiler.ir.interpreter import Interpreter
from tests.harness import programs


def weight_f64(codes: Tensor, scale: Tensor, offset: Tensor | None, table: Tensor | None) -> Tensor:
    values = codes.double() if table is None else torch.from_numpy(table[0].numpy().astype(np.float64)[codes.numpy()])
    weight = scale.double() * values
    return weight if offset is None else weight + offset.double()[:, None]


def activation_f64(codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor) -> Tensor:
    per_row = codes.shape[0] // len(group)
    g = group.numpy().repeat(per_row)
    shape = (-1, *[1] * (codes.dim() - 1))
    s, z = (torch.from_numpy(t.numpy().astype(np.float64)[g]).reshape(shape) for t in (scale, zero))
    return (codes.double() - z) * s


def linear_f64(x, group, codes, scale, offset, table, row_class, scales, zeros, bias, segments) -> Tensor:
    y = activation_f64(x, scales[0], zeros[0], group) @ weight_f64(codes, scale, offset, table).T
    return y if bias is None else y + bias.double()


def conv_f64(x, group, codes, scale, offset, table, row_class, scales, zeros, bias, *geometry) -> Tensor:
    _, kernel, stride, (top, bottom, left, right) = geometry
    weight = weight_f64(codes, scale, offset, table).reshape(len(codes), *kernel, -1).permute(0, 3, 1, 2)
    image = F.pad(activation_f64(x, scales[0], zeros[0], group).permute(0, 3, 1, 2), (left, right, top, bottom))
    return F.conv2d(image, weight, None if bias is None else bias.double(), stride).permute(0, 2, 3, 1)


def quantize_numpy(x: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int) -> np.ndarray:
    g = group.numpy().repeat(x.shape[0] // len(group)).reshape(-1, *[1] * (x.dim() - 1))
    s, z = scale.numpy().astype(np.float32)[g], zero.numpy().astype(np.float32)[g]
    inverse = np.float32(1) / s
    return (np.rint(np.clip(x.numpy() * inverse, -z, np.float32(2**bits - 1) - z)) + z).astype(np.uint8)


class Comparing(Interpreter):
    """Compares every packed call with its formula, on the operands that it really gets."""

    compared = 0

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        value = super().call(node, args, kwargs)
        if node.target in (ops.quant_linear, ops.quant_conv2d):
            formula = (linear_f64 if node.target is ops.quant_linear else conv_f64)(*args)
            assert float((value - formula).abs().max()) <= 1e-6 * float(formula.abs().max()), node.name
            self.compared += 1
        elif node.target is ops.quantize:
            np.testing.assert_array_equal(value.numpy(), quantize_numpy(*args))
            self.compared += 1
        return value


@pytest.mark.parametrize("model", programs.MODELS)
@torch.no_grad()
@pytest.mark.invariant("mixdq-4")
def test_every_packed_call_equals_the_formula(model):
    comparing = Comparing(programs.after(model, "fold-fake-quant"))
    comparing.run(programs.inputs(model, 2))
    assert comparing.compared > 40


@torch.no_grad()
def test_an_open_weight_runs_exactly_too():
    """Exact mode before rounding: codes are those of the nearest levels at the stored scales."""
    program = programs.after("pixart", "insert-fake-quant")
    x = programs.inputs("pixart", 2)
    found = {}
    exact_interpreter.run_exact(program, x, lambda node, value: found.__setitem__(node.name, value))
    layers = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(layers) > 10
    for node in layers:
        weight, bias = found[node.args[1].name], program.tensors.read(str(node.args[2].target))
        codes, tables = found[node.args[0].name], weight.tables
        values = activation_f64(codes.codes, codes.scale, codes.zero_point, codes.group)
        formula = values @ weight_f64(weight.codes, tables.scale, tables.offset, tables.lut).T + bias.double()
        assert float((found[node.name] - formula).abs().max()) <= 1e-6 * float(formula.abs().max())
        rows = program.tensors.read(str(node.args[1].args[0].target))
        level = weight_f64(weight.codes, tables.scale, tables.offset, tables.lut)
        grid = weight_f64(
            torch.arange(len(tables.lut[0]), dtype=torch.uint8).expand(len(rows), -1)
            if tables.lut is not None
            else torch.arange(-127, 128, dtype=torch.int8).expand(len(rows), -1),
            tables.scale,
            tables.offset,
            tables.lut,
        )
        nearest = (rows.double()[:, :, None] - grid[:, None, :]).abs().amin(-1)
        assert torch.allclose((rows - level).abs(), nearest, rtol=1e-4, atol=1e-9)
