"""The numerics of what stays float: constants that their reference meaning (`ir.ops`) and their kernels share.

Nothing here imports torch or TVM.
"""

from __future__ import annotations

F32, BF16, INT8 = "f32", "bf16", "int8"
NUMERICS = (F32, BF16, INT8)
"""How an attention computes: all in float32, its products in bfloat16, or its products on 8-bit codes."""
F16 = "f16"
"""How GPUs may store what kernels hand on: as the nearest float16. All is computed in `NUMERICS`."""
LARGEST_HALF = 65504.0
"""The largest float16, which is stored for what is beyond it."""

BOUNDS = {F32: 1e-5, BF16: 1e-2, INT8: 1e-6}
"""Largest allowed error ``max|y - y'| / max|y'|`` of a kernel against the reference meaning in the same numerics."""

_FEATURES = {(BF16, "x86_64"): ("avx512_bf16",), (BF16, "aarch64"): ("bf16",)}
"""By numerics and architecture; the others need nothing beyond their target's."""


def features_of(kind: str, arch: str) -> tuple[str, ...]:
    """CPU features that kernels in those numerics need beyond their target's, as /proc/cpuinfo spells them."""
    return _FEATURES.get((kind, arch), ())


PACKED = {BF16: 2, INT8: 4}
"""How many values fill a word of 32 bits."""

KEY_BLOCK = 96
"""Number of keys in a block: a block shares one scale of K, and for each query one scale of P."""

def ready_shapes(kind: str, keys: int, heads: int, dim: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type, by name, of the packed keys and values of one sample, as the kernels read them.

    Args:
        kind: the numerics, `BF16` or `INT8`; with `INT8` the scales of keys and values are among them.
        keys: number of keys.
        heads: number of heads.
        dim: channels of a head.
    """
    words, rows = (-(-count // PACKED[kind]) for count in (dim, keys))
    if kind == INT8:  # some targets multiply two words at once, a last one beside zeros
        words, rows = (count + count % 2 for count in (words, rows))
    made: dict[str, tuple[tuple[int, ...], str]] = {
        "packed_k": ((heads, keys, words), "int32"),
        "packed_v": ((heads, rows, dim), "int32"),
    }
    if kind == INT8:
        made |= {"k_scale": ((heads, -(-keys // KEY_BLOCK)), "float32"), "v_scale": ((heads, dim), "float32")}
    return made


FLOAT = "float"
"""The name of the choice not to quantize: an attention's format, or an activation's width."""
FLOAT_BITS = 32
"""The bits of a value that is not quantized."""
BRANCH_BITS = 16
"""The bits of the factors of a low-rank branch."""
SMALLEST = 1e-20
"""Lower bound of a block's largest magnitude, by which its codes are scaled: a block of zeros divides by this."""


def rotation_sign(i: int) -> float:
    """Element i of the Golay-Rudin-Shapiro sequence: -1 to the number of adjacent pairs of ones in binary i."""
    return -1.0 if (i & i >> 1).bit_count() % 2 else 1.0


EXP2_COARSE = (0.05517162371997846, 0.24261111871702196, 0.6932609938289391, 0.9999280739673682)
"""Coefficients of a polynomial for 2^r on [-1/2, 1/2], highest power first.

Its error is at most 7.5e-5, far below a step of 8 bits.
"""
EXP2_ABOVE = (0.07802446, 0.22606725, 0.6958335, 0.9999252)
"""Coefficients for 2^r on [0, 1): `EXP2_COARSE` of r - 1/2, times the root of 2."""


def layer_bops(macs: int, weight_bits: int, activation_bits: int, branch_macs: int = 0) -> int:
    """The bit operations of a layer: multiply-accumulates times the bits of both operands.

    Args:
        macs: multiply-accumulates of the layer.
        weight_bits: of a weight as it is multiplied (`Format.operand_bits`).
        activation_bits: of what the layer reads; 32 of floats.
        branch_macs: multiply-accumulates of a low-rank branch, which reads floats.
    """
    return macs * weight_bits * activation_bits + branch_macs * BRANCH_BITS * FLOAT_BITS
