"""SDNQ: the folder of a diffusers model whose layers SD.Next's quantizer unpacks and diffusers loads.

A weight is ``scale * code``, ``scale * code + zero_point`` or, with a codebook, ``scale[code]``; scales are those of a
row or of a group of its input channels, at each tap of a convolution. Every layer has the type and group that it needs,
so grids of the artifact stay what they are, and a low-rank branch stays beside them. Other matrices are f16, and
vectors f32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from mpq_compiler.formats import floating
from mpq_compiler.interchange.container import Grid, Layer, Written
from mpq_compiler.support.decibels import sqnr
from mpq_compiler.support.files import decode_json, encode_json

METHOD = "sdnq"
"""What config.json calls the project."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
LEAST = 16
"""The least input channels of a group, where the groups of the artifact differ in size."""
GROUP = 64
"""The input channels of a group of a weight that has to be rounded once more."""
FLOATS = {2: "float8_e2m5fn", 3: "float8_e3m4fn", 4: "float8_e4m3fn_sdnq", 5: "float8_e5m2fn"}
"""The types of 8-bit floats without infinities and NaNs, by their bits of exponent."""
PACKED = {
    2: [[(0, 0, 2), (1, 0, 2), (2, 0, 2), (3, 0, 2)]],
    3: [[(0, 0, 3), (3, 0, 3), (6, 0, 2)], [(1, 0, 3), (4, 0, 3), (7, 0, 2)],
        [(2, 0, 3), (5, 0, 3), (6, 2, 1), (7, 2, 1)]],
    4: [[(0, 0, 4), (1, 0, 4)]],
    5: [[(0, 0, 5), (5, 0, 3)], [(1, 0, 5), (6, 0, 3)], [(2, 0, 5), (7, 0, 3)],
        [(3, 0, 5), (5, 3, 2), (7, 4, 1)], [(4, 0, 5), (6, 3, 2), (7, 3, 1)]],
    6: [[(code, 0, 6), (3, 4 - 2 * code, 2)] for code in range(3)],
    7: [[(code, 0, 7), (7, 6 - code, 1)] for code in range(7)],
}  # fmt: skip
"""The bytes that some codes of so many bits are packed in; of each, from its lowest bit, (code, first bit, bits)."""
CODES = {2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8, 8: 1}
"""How many codes of so many bits are packed together."""


@dataclass(frozen=True)
class Stored:
    """A weight as it is stored."""

    type: str
    """The one of SDNQ's."""
    bits: int
    value: np.ndarray
    """What SDNQ makes of it, f32."""
    tensors: Mapping[str, np.ndarray]
    """The stored tensors by the names that they have in the module."""
    options: Mapping[str, object] = field(default_factory=dict)
    """What SDNQ has to be told beside the type."""

    @property
    def bytes(self) -> int:
        """The bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes u8: bytes [n] or [n, bytes together] of 2 to 7 bits; those of 8 stay as they are."""
    if bits == 8:
        return codes
    codes = codes.reshape(-1, CODES[bits])
    columns = []
    for fields in PACKED[bits]:
        column, at = np.zeros(len(codes), np.uint8), 0
        for code, first, width in fields:
            column |= (codes[:, code] >> first & (1 << width) - 1) << at
            at += width
        columns.append(column)
    return columns[0] if len(columns) == 1 else np.stack(columns, 1)


def _fitting(span: int, count: int) -> int | None:
    """The least bits that number ``span`` codes and pack ``count`` of them; None: more than 8."""
    return next((bits for bits in CODES if span <= 1 << bits and count % CODES[bits] == 0), None)


def _grouped(value: np.ndarray, groups: int) -> np.ndarray:
    """Splits the input channels of [O, C, ...] into groups, [O, groups, C / groups, ...]; one group stays as it is."""
    return value if groups == 1 else value.reshape(len(value), groups, -1, *value.shape[2:])


def _over_taps(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The numbers [O, groups] of rows in the shape that SDNQ has for scales of such codes, one for each tap."""
    axis = 1 if rows.shape[1] == 1 else 2
    rows = rows.reshape(*rows.shape, *[1] * (codes.ndim - rows.ndim))
    return np.broadcast_to(rows, (*codes.shape[:axis], 1, *codes.shape[axis + 1 :]))


def _integers(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, bits: int) -> Stored:
    """The weight ``scale * code + zero`` of codes [O, C, ...] or [O, groups, C, ...]; signed without a zero point."""
    tensors = {"weight": codes.astype(np.int8), "scale": scale}
    if zero is not None:
        tensors |= {"weight": pack(codes.astype(np.uint8), bits), "zero_point": zero}
    elif bits < 8:
        tensors["weight"] = pack((codes + (1 << bits - 1)).astype(np.uint8), bits)
    value = codes.astype(np.float32) * scale + (0 if zero is None else zero)
    options = {"group_size": codes.shape[2]} if scale.shape[1] > 1 else {}
    return Stored(f"{'int' if zero is None else 'uint'}{bits}", bits, value, tensors, options)


def _on_grid(levels: np.ndarray, grid: Grid) -> Iterator[Stored]:
    """Stores levels [O, C, ...] of whole numbers: as signed codes, and as those of their even steps from the lowest."""
    size = math.gcd(*grid.segments)
    if size < LEAST and len(grid.segments) > 1:
        return
    rows = np.repeat(grid.scale, [segment // size for segment in grid.segments], 1)
    parts = _grouped(levels, rows.shape[1])
    scale, low, high = _over_taps(rows, parts), int(levels.min()), int(levels.max())
    if grid.offset is None and (bits := _fitting(2 * max(-low, high + 1), levels.size)):
        yield _integers(parts, scale, None, bits)
    each = int(np.gcd.reduce(levels - low, axis=None)) or 1
    if bits := _fitting((high - low) // each + 1, levels.size):
        zero = scale * np.float32(low)
        if grid.offset is not None:
            zero = zero + _over_taps(np.broadcast_to(grid.offset[:, None], rows.shape), parts)
        yield _integers((parts - low) // each, scale * np.float32(each), zero, bits)


def _codebook(base: np.ndarray, most: int) -> Iterator[Stored]:
    """Stores a weight whose rows have at most so many different values, which are their codebooks."""
    rows = base.reshape(len(base), -1)
    order = np.argsort(rows, 1)
    rising = np.take_along_axis(rows, order, 1)
    rank = np.zeros(rows.shape, np.int64)
    np.cumsum(rising[:, 1:] != rising[:, :-1], 1, out=rank[:, 1:])
    values = int(rank.max()) + 1
    if values <= most and (bits := _fitting(values, base.size)):
        codes, levels = np.zeros(rows.shape, np.uint8), np.zeros((len(rows), 1 << bits), np.float32)
        np.put_along_axis(codes, order, rank.astype(np.uint8), 1)
        np.put_along_axis(levels, rank, rising, 1)
        taps = (*levels.shape, *base.shape[2:])
        scale = np.broadcast_to(levels.reshape(*levels.shape, *[1] * (base.ndim - 2)), taps)
        tensors = {"weight": pack(codes.reshape(base.shape), bits), "scale": scale}
        yield Stored(f"uint{bits}", bits, base, tensors, {"use_codebook": True})


def _float8(base: np.ndarray, grid: Grid, exponent: int) -> Stored:
    """Stores the 8-bit floats that a weight is, a scale a row."""
    rows, steps = torch.from_numpy(base.reshape(len(base), -1)), torch.from_numpy(grid.scale[:, 0])
    codes = floating.float8(rows, steps, exponent).codes.numpy().reshape(base.shape)
    return Stored(FLOATS[exponent], 8, base, {"weight": codes, "scale": _over_taps(grid.scale, base)})


def _rounded(value: np.ndarray, bits: int) -> Stored:
    """Rounds a weight to as many bits: 8 with a scale a row, fewer with scale and zero point for `GROUP` channels."""
    bits = _fitting(1 << bits, value.size) or 8
    groups = value.shape[1] // GROUP if bits < 8 and value.shape[1] % GROUP == 0 else 1
    parts, axis = _grouped(value, groups), 1 if groups < 2 else 2
    zero = parts.min(axis, keepdims=True) if bits < 8 else None
    wide = np.abs(parts).max(axis, keepdims=True) if zero is None else parts.max(axis, keepdims=True) - zero
    scale = wide / ((1 << bits) - 1 if bits < 8 else 127)
    scale[scale == 0] = 1
    return _integers(np.rint((parts - (0 if zero is None else zero)) / scale).astype(np.int32), scale, zero, bits)


def stored(layer: Layer) -> Stored:
    """Stores a quantized weight in the smallest form that holds its values; else rounds it to as many bits."""
    assert layer.bits is not None
    value, grid = layer.value, layer.grid
    if grid is None:
        return _rounded(value, layer.bits)
    if grid.exponent is not None:
        return _float8(value, grid, grid.exponent)
    added = None if grid.branch is None else _product(*grid.branch)
    columns = (len(value), -1, *[1] * (value.ndim - 2))
    scale = np.repeat(grid.scale, grid.segments, 1).reshape(columns)
    offset = np.float32(0) if grid.offset is None else grid.offset.reshape(columns)
    levels = np.rint(((value if added is None else value - added) - offset) / scale).astype(np.int32)
    forms = [*_on_grid(levels, grid)]
    if not any(form.bits <= layer.bits for form in forms):
        forms += _codebook(levels.astype(np.float32) * scale + offset, 1 << layer.bits)
    if not forms:
        return _rounded(value, layer.bits)
    least = min(forms, key=lambda form: form.bytes)
    if grid.branch is None:
        return least
    up, down = grid.branch
    tensors = {**least.tensors, "svd_up": up, "svd_down": down.reshape(len(down), -1)}
    options = {**least.options, "use_svd": True, "svd_rank": len(down)}
    return replace(least, value=least.value.reshape(value.shape) + added, tensors=tensors, options=options)


def _product(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The product of factors f16 [O, r] and [r, ...], f32."""
    wide = up.astype(np.float32) @ down.reshape(len(down), -1).astype(np.float32)
    return wide.reshape(len(up), *down.shape[1:])


def is_folder(path: Path) -> bool:
    """Whether a path is a folder that was written so."""
    try:
        config = decode_json((path / "config.json").read_bytes())
        return bool(config["quantization_config"]["quant_method"] == METHOD)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def write(folder: Path, layers: Mapping[str, Layer], config: Mapping[str, object]) -> list[Written]:
    """Writes a folder, and says what became of each layer.

    Args:
        folder: the new one.
        layers: the parameters, by diffusers' names.
        config: of the model.
    """
    tensors: dict[str, np.ndarray] = {}
    options: dict[str, object] = {}
    written = []
    for name, layer in layers.items():
        module, _, leaf = name.rpartition(".")
        if layer.bits is not None and layer.value.ndim > 1 and leaf == "weight":
            made = stored(layer)
            tensors |= {f"{module}.{part}": np.ascontiguousarray(tensor) for part, tensor in made.tensors.items()}
            options[name] = {"weights_dtype": made.type, **made.options}
            value, kind, size = made.value.reshape(layer.value.shape), made.type, made.bytes
            kind += " codebook" if "use_codebook" in made.options else ""
        else:
            tensors[name] = layer.value.astype(np.float32 if layer.value.ndim < 2 else np.float16)
            value, kind, size = tensors[name].astype(np.float32), str(tensors[name].dtype), tensors[name].nbytes
        written.append(Written(layer, kind, size, sqnr(layer.value, value)))
    quantization = {
        "quant_method": METHOD,
        "weights_dtype": "int8",
        "group_size": -1,
        "quant_conv": True,
        "quant_embedding": True,
        "modules_quant_config": options,
        "modules_to_not_convert": [name for name in layers if name.endswith(".weight") and name not in options],
    }
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_bytes(encode_json({**config, "quantization_config": quantization}))
    return written
