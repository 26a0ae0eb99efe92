"""The `mpq::` operators: what each node of the graph means, in plain torch.

These functions are the definition that every backend is checked against. Activations are contiguous and
channels-last: images [B, H, W, C], tokens [B, T, C], vectors [B, C]. A row belongs to the sample
``row // (rows / B)`` of the batch.

Rounding is to nearest, ties to even, in every step of the exact arithmetic; `fma` is the fused
multiply-add of IEEE 754.

A module holds the operators of one subject and registers them by `op`; this package names them all, because a node's
target is the function itself.
"""

# The order of these imports is that of `OPS`.
# isort: off
from mpq_compiler.ir.ops.registry import OPS, Op, name_of, op
from mpq_compiler.ir.ops.floating import (
    CACHED,
    NUMERICAL,
    conv2d,
    fma,
    group_norm,
    hadamard,
    keep,
    linear,
    for_each_sample,
    prepend,
    row_of_token,
    rms_norm,
    rotation_signs,
    upsample_nearest2d,
)
from mpq_compiler.ir.ops.attention import attention, attention_probabilities, fast_attention, join_heads, split_heads
from mpq_compiler.ir.ops.activations import (
    SMALLEST_SCALE,
    dynamic_fake_quantize,
    dynamic_quantize,
    fake_quantize,
    fake_quantize_float,
    per_sample,
    quantize,
    row_ranges,
    time_group,
)
from mpq_compiler.ir.ops.weights import (
    binary_branch,
    dequantize_float8,
    dequantize_weight,
    fake_quantize_float8,
    fake_quantize_weight,
)
from mpq_compiler.ir.ops.packed import FEW_SEGMENTS, quant_conv2d, quant_linear
from mpq_compiler.ir.ops.quantized_attention import fake_quantize_attention, quant_attention
# isort: on

__all__ = [
    "CACHED",
    "FEW_SEGMENTS",
    "NUMERICAL",
    "OPS",
    "SMALLEST_SCALE",
    "Op",
    "attention",
    "attention_probabilities",
    "binary_branch",
    "conv2d",
    "dequantize_float8",
    "dequantize_weight",
    "dynamic_fake_quantize",
    "dynamic_quantize",
    "fake_quantize",
    "fake_quantize_attention",
    "fake_quantize_float",
    "fake_quantize_float8",
    "fake_quantize_weight",
    "fast_attention",
    "fma",
    "for_each_sample",
    "group_norm",
    "hadamard",
    "join_heads",
    "keep",
    "linear",
    "name_of",
    "op",
    "per_sample",
    "prepend",
    "quant_attention",
    "quant_conv2d",
    "quant_linear",
    "quantize",
    "rms_norm",
    "rotation_signs",
    "row_of_token",
    "row_ranges",
    "split_heads",
    "time_group",
    "upsample_nearest2d",
]
