"""GGUF: the types of ggml's blocks, and the file that stable-diffusion.cpp, ComfyUI-GGUF and diffusers load.

Rows of linear layers are quantized; ggml has no quantized convolutions, so other weights are f16, and vectors f32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from mpq_compiler.interchange.container import Layer, Written
from mpq_compiler.support.decibels import sqnr

SMALL = 32
"""The least numbers of a block."""


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16)


def _inverse(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.divide(1.0, values, out=np.zeros_like(values), where=values != 0)
    return found


def _even(blocks: np.ndarray, steps: np.ndarray | None, least: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """(f16 step, whole numbers of it from ``least`` to ``most``) of blocks [..., n], symmetric about zero.

    The step is that of the largest magnitude, or the one of ``steps`` [..., 1] where it errs less: what is a grid
    already stays exactly what it is.
    """
    widest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    tried = [_half(widest / least), _half(np.abs(widest) / most)] + ([] if steps is None else [_half(steps)])
    best, codes, error = tried[0], np.zeros(blocks.shape), np.full(widest.shape, np.inf)
    for step in tried:
        wide = step.astype(np.float32)
        now = np.clip(np.rint(blocks * _inverse(wide)), least, most)
        off = ((now * wide - blocks) ** 2).sum(-1, keepdims=True)
        closer = off < error
        best, codes, error = np.where(closer, step, best), np.where(closer, now, codes), np.minimum(off, error)
    return best, codes.astype(np.int32)


def _affine(blocks: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(f16 step, f16 least value, codes from 0 to ``most``) of blocks [..., n]."""
    low = _half(blocks.min(-1, keepdims=True))
    wide = low.astype(np.float32)
    step = _half((blocks.max(-1, keepdims=True) - wide) / most)
    return step, low, np.clip(np.rint((blocks - wide) * _inverse(step.astype(np.float32))), 0, most).astype(np.int32)


def _bytes(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], -1)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte: those of the first half of a block in the low bits."""
    half = codes.shape[-1] // 2
    return ((codes[..., :half] & 15) | (codes[..., half:] & 15) << 4).astype(np.uint8)


def _fifth(codes: np.ndarray) -> np.ndarray:
    """The fifth bits of a block's codes, four bytes."""
    return np.packbits((codes >> 4 & 1).astype(np.uint8), axis=-1, bitorder="little")


def _q8_0(blocks: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    step, codes = _even(blocks, steps, -127, 127)
    return _bytes(step, codes.astype(np.int8))


def _q4_0(blocks: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    step, codes = _even(blocks, steps, -8, 7)
    return _bytes(step, _nibbles(codes + 8))


def _q5_0(blocks: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    step, codes = _even(blocks, steps, -16, 15)
    return _bytes(step, _fifth(codes + 16), _nibbles(codes + 16))


def _q4_1(blocks: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    step, low, codes = _affine(blocks, 15)
    return _bytes(step, low, _nibbles(codes))


def _q5_1(blocks: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    step, low, codes = _affine(blocks, 31)
    return _bytes(step, low, _fifth(codes), _nibbles(codes))


def _scaled(blocks: np.ndarray, steps: np.ndarray | None, least: int, most: int, scales: int) -> tuple[np.ndarray, ...]:
    """(f16 step [n, 1], scales [n, 16] up to ``scales``, codes [n, 16, 16]) of super-blocks of 16 symmetric blocks."""
    parts = blocks.reshape(len(blocks), 16, 16)
    own, _ = _even(parts, None, least, most)
    step = _half(np.abs(own[..., 0].astype(np.float32)).max(-1, keepdims=True) / scales)
    wide = step.astype(np.float32)
    scale = np.clip(np.rint(own[..., 0].astype(np.float32) * _inverse(wide)), -scales - 1, scales)
    codes = np.clip(np.rint(parts * _inverse(scale * wide)[..., None]), least, most)
    if steps is not None:
        given = _half(steps).astype(np.float32)
        ones = np.ones_like(scale)
        exact = np.clip(np.rint(parts * _inverse(given)[..., None]), least, most)
        off = ((codes * (scale * wide)[..., None] - parts) ** 2).sum((1, 2))
        closer = ((exact * given[..., None] - parts) ** 2).sum((1, 2)) < off
        step, scale = np.where(closer[:, None], _half(steps), step), np.where(closer[:, None], ones, scale)
        codes = np.where(closer[:, None, None], exact, codes)
    return step, scale.astype(np.int32), codes.astype(np.int32)


def _q6_k(blocks: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    step, scales, codes = _scaled(blocks, steps, -32, 31, 127)
    q = (codes + 32).reshape(-1, 2, 4, 32)
    low = q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4
    high = q >> 4
    two = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    flat = (low.reshape(len(q), 128).astype(np.uint8), two.reshape(len(q), 64).astype(np.uint8))
    return _bytes(*flat, scales.astype(np.int8), step)


def _q3_k(blocks: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    step, scales, codes = _scaled(blocks, steps, -4, 3, 31)
    q = (codes + 4).reshape(-1, 2, 4, 32)
    two = sum((q[:, :, i] & 3) << 2 * i for i in range(4))
    top = (q >> 2).reshape(len(q), 8, 32)
    mask = sum(top[:, i] << i for i in range(8))
    six = scales + 32
    low = six[:, :8] & 15 | (six[:, 8:] & 15) << 4
    high = sum((six[:, 4 * i : 4 * i + 4] >> 4) << 2 * i for i in range(4))
    parts = (mask, np.reshape(two, (len(q), 64)), low, high)
    return _bytes(*(np.asarray(part).astype(np.uint8) for part in parts), step)


def _q2_k(blocks: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    parts = blocks.reshape(len(blocks), 16, 16)
    low = np.minimum(parts.min(-1), 0)
    wide = (parts.max(-1) - low) / 3
    d, dmin = (_half(v.max(-1, keepdims=True) / 15) for v in (wide, -low))
    scale = np.clip(np.rint(wide * _inverse(d.astype(np.float32))), 0, 15)
    least = np.clip(np.rint(-low * _inverse(dmin.astype(np.float32))), 0, 15)
    shifted = parts + (least * dmin.astype(np.float32))[..., None]
    codes = np.clip(np.rint(shifted * _inverse(scale * d.astype(np.float32))[..., None]), 0, 3).astype(np.int32)
    q = codes.reshape(-1, 2, 4, 32)
    two = np.asarray(sum(q[:, :, i] << 2 * i for i in range(4))).reshape(len(q), 64).astype(np.uint8)
    return _bytes((scale.astype(np.uint8) | least.astype(np.uint8) << 4), two, d, dmin)


@dataclass(frozen=True)
class Kind:
    """A type of blocks."""

    type: Type
    bits: int
    """The bits of a code."""
    encode: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    """The bytes [n, type size] of blocks f32 [n, block size], given the steps [n, 1] of a grid, or None."""


KINDS = (
    Kind(Type.Q2_K, 2, _q2_k),
    Kind(Type.Q3_K, 3, _q3_k),
    Kind(Type.Q4_0, 4, _q4_0),
    Kind(Type.Q4_1, 4, _q4_1),
    Kind(Type.Q5_0, 5, _q5_0),
    Kind(Type.Q5_1, 5, _q5_1),
    Kind(Type.Q6_K, 6, _q6_k),
    Kind(Type.Q8_0, 8, _q8_0),
)
"""The types, by rising bits."""


def encode(kind: Kind, weight: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    """Encodes rows [O, K], whose values may be whole numbers of the steps [O], as bytes [O, bytes of a row]."""
    size, _ = gguf.GGML_QUANT_SIZES[kind.type]
    blocks = weight.reshape(-1, size)
    given = None if steps is None else np.repeat(steps[:, None], weight.shape[1] // size, 0)
    return kind.encode(blocks, given).reshape(len(weight), -1)


def stored(layer: Layer) -> tuple[Type, np.ndarray, np.ndarray]:
    """(type, stored bytes, their values) of a parameter: the types of the least bits that are enough, the nearest."""
    value = layer.value
    if layer.bits is None or value.ndim != 2 or value.shape[1] % SMALL:
        type_ = Type.F32 if value.ndim < 2 else Type.F16
        kept = gguf.quantize(value, type_)
        return type_, kept, kept.astype(np.float32)
    fitting = [k for k in KINDS if k.bits >= layer.bits and value.shape[1] % gguf.GGML_QUANT_SIZES[k.type][0] == 0]
    best: tuple[Type, np.ndarray, np.ndarray] | None = None
    for kind in (k for k in fitting if k.bits == fitting[0].bits):
        data = encode(kind, value, layer.step)
        made = gguf.dequantize(data, kind.type)
        if best is None or sqnr(value, made) > sqnr(value, best[2]) + 1.0:  # of a larger type only what it gains
            best = (kind.type, data, made)
    assert best is not None
    return best


def write(path: Path, layers: Mapping[str, Layer], architecture: str) -> list[Written]:
    """Writes a file, and says what became of each layer.

    Args:
        path: of the new file.
        layers: the parameters, by their names in the file.
        architecture: ComfyUI-GGUF's word for the family.
    """
    writer = gguf.GGUFWriter(path, architecture)
    rows = []
    for name, layer in layers.items():
        type_, data, made = stored(layer)
        writer.add_tensor(name, data, raw_dtype=type_)
        rows.append(Written(layer, type_.name, data.nbytes, sqnr(layer.value, made)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rows
