"""The signatures of kernels that every device calls alike, by template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpq_compiler.backends.tvm.kernels.problems import (
    attention,
    dequantize,
    fast_attention,
    float8,
    float_gemm,
    hadamard,
    matmul,
    movement,
    norms,
    pointwise,
    quantize,
    rans,
    rounding,
)
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument


@dataclass(frozen=True)
class Signature:
    """The buffers that kernels of a family are called with.

    arguments: problem -> buffers in calling order, the outputs last
    outputs:   problem -> how many outputs there are
    """

    arguments: Callable[[Any], list[Argument]]
    outputs: Callable[[Any], int] = lambda problem: 1


SIGNATURES: dict[str, Signature] = {
    "pack": Signature(float_gemm.pack_arguments),
    "quantize": Signature(quantize.arguments, quantize.outputs),
    "norms": Signature(norms.arguments, norms.outputs),
    "hadamard": Signature(hadamard.arguments),
    "attention": Signature(attention.arguments),
    "fast_attention": Signature(fast_attention.arguments, fast_attention.results),
    "pointwise": Signature(pointwise.arguments),
    "movement": Signature(movement.arguments),
    "float_gemm": Signature(float_gemm.arguments),
    "matmul": Signature(matmul.arguments),
    "float8": Signature(float8.arguments),
    "dequantize": Signature(dequantize.arguments),
    "rans": Signature(rans.arguments),
    "rounding": Signature(rounding.arguments),
}
"""Signatures by family, without integer products: how their weights lie in memory is a device's choice."""
