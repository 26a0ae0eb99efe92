"""Shape inference of the quantized operators, which `interpreter.shapes` runs in place of their arithmetic.

The exact epilogue alone takes dozens of elementwise steps, whose shapes are known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq_compiler.ir.ops.activations import fake_quantize, fake_quantize_float, quantize
from mpq_compiler.ir.ops.attention import attention
from mpq_compiler.ir.ops.floating import conv2d, hadamard
from mpq_compiler.ir.ops.packed import quant_conv2d, quant_linear
from mpq_compiler.ir.ops.quantized_attention import fake_quantize_attention, quant_attention
from mpq_compiler.ir.ops.weights import (
    dequantize_float8,
    dequantize_weight,
    fake_quantize_float8,
    fake_quantize_weight,
)
from mpq_compiler.targets.numerics import F32


def _operands(x: Tensor, codes: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return x.to(torch.float32), codes.to(torch.float32), None if bias is None else bias.to(torch.float32)


def _quant_linear(*args: Any) -> Tensor:
    return F.linear(*_operands(args[0], args[2], args[9]))


def _quant_conv2d(*args: Any) -> Tensor:
    kernel, stride, padding = args[11:14]
    x, codes, bias = _operands(args[0], args[2], args[9])
    return conv2d(x, codes.reshape(len(codes), *kernel, -1), bias, stride, padding)


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int) -> Tensor:
    if x.shape[0] % group.shape[0]:
        raise ValueError(f"{x.shape[0]} rows do not divide into a batch of {group.shape[0]}")
    return x.to(torch.uint8)


def _fake_quantize(*args: Any) -> Tensor:
    return _quantize(*args).to(args[0].dtype)


def _fake_quantize_float(x: Tensor, scale: Tensor, group: Tensor, *_: Any) -> Tensor:
    return _quantize(x, scale, scale, group, 8).to(x.dtype)


def _fake_quantize_weight(weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


def _dequantize_weight(codes: Tensor, *operands: Any) -> Tensor:
    return codes.to(torch.float32).reshape(list(operands[4]))  # behind `WeightTables.operands`


def _dequantize_float8(codes: Tensor, scale: Tensor, shape: Any, exponent: int = 4) -> Tensor:
    return codes.to(torch.float32).reshape(list(shape))


def _hadamard(x: Tensor, block: int) -> Tensor:
    if block & (block - 1) or x.shape[-1] % block:
        raise ValueError(f"{x.shape[-1]} channels do not divide into blocks of {block}, a power of two")
    return x.contiguous()


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, numerics: str = F32) -> Tensor:
    return attention(q, k, v, *rest)


def _fake_quantize_attention(q: Tensor, k: Tensor, v: Tensor, group: Tensor, *rest: Any) -> Tensor:
    scale, zero, *arguments, bits = rest
    for x in (q, k, v):
        _quantize(x, scale, zero, group, bits)
    return attention(q, k, v, *arguments)


def _quant_attention(q: Tensor, k: Tensor, v: Tensor, group: Tensor, *rest: Any) -> Tensor:
    return _fake_quantize_attention(*(x.to(torch.float32) for x in (q, k, v)), group, *rest[6:])


SHAPES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    quantize: _quantize,
    fake_quantize: _fake_quantize,
    fake_quantize_float: _fake_quantize_float,
    fake_quantize_weight: _fake_quantize_weight,
    dequantize_weight: _dequantize_weight,
    fake_quantize_float8: _fake_quantize_weight,
    dequantize_float8: _dequantize_float8,
    quant_linear: _quant_linear,
    quant_conv2d: _quant_conv2d,
    hadamard: _hadamard,
    attention: _attention,
    fake_quantize_attention: _fake_quantize_attention,
    quant_attention: _quant_attention,
}
"""Operator -> its shape function, of the same arguments; the others run on meta tensors as they are."""
