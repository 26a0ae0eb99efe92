"""The numerics of attentions, and what their meaning (`ops`) and their kernels share. Imports neither torch nor TVM."""

from __future__ import annotations

F32, BF16, INT8 = "f32", "bf16", "int8"
NUMERICS = (F32, BF16, INT8)
"""Of an attention: in float32; products in bfloat16; products of 8-bit codes."""

BOUNDS = {F32: 1e-5, BF16: 1e-2, INT8: 1e-6}
"""Largest allowed ``max|y - y'| / max|y'|`` of a kernel against the meaning of the same numerics."""

FEATURES: dict[str, tuple[str, ...]] = {F32: (), BF16: ("avx512_bf16",), INT8: ("avx512_vnni",)}
"""What the kernels ask of a CPU, as /proc/cpuinfo spells it."""

PACKED = {BF16: 2, INT8: 4}
"""Values in a word of 32 bits."""

KEY_BLOCK = 96
"""Keys that share a scale of K, and a scale of P for each query."""

def ready_shapes(kind: str, keys: int, heads: int, dim: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Keys and values of a sample as the kernels read them: shape and type by name (`kernels.fast_attention`)."""
    packed = PACKED[kind]
    made: dict[str, tuple[tuple[int, ...], str]] = {
        "packed_k": ((heads, keys, -(-dim // packed)), "int32"),
        "packed_v": ((heads, -(-keys // packed), dim), "int32"),
    }
    if kind == INT8:
        made |= {"k_scale": ((heads, -(-keys // KEY_BLOCK)), "float32"), "v_scale": ((heads, dim), "float32")}
    return made


SMALLEST = 1e-20
"""Of the largest magnitudes that codes are scaled by."""

def rotation_sign(i: int) -> float:
    """-1 to the number of pairs of neighbouring ones in binary i: the sequence of Golay, Rudin and Shapiro."""
    return -1.0 if (i & i >> 1).bit_count() % 2 else 1.0


EXP2_COARSE = (0.05517162371997846, 0.24261111871702196, 0.6932609938289391, 0.9999280739673682)
"""2^r on [-1/2, 1/2] within 7.5e-5, far below a step of 8 bits; highest power first."""
