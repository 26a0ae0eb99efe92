"""The weight contract: its limits, and the arithmetic that formats and operators share.

``W[i,k] = scale[i, kgroup(k)] * LUT[class(i)][code[i,k]] + offset[i]``, with at most `LUT_MAX` entries of int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

TOGETHER = 1 << 19
"""The elements of a weight that are worked on together: what is made of them on the way stays in a core's cache."""

_T = TypeVar("_T")
_U = TypeVar("_U")


class WeightTables(NamedTuple, Generic[_T]):
    """The parts of a quantized weight that its codes refer to, as tensors, store names or nodes.

    The order is that of the operands which follow ``codes`` in the `mpq::` operators.
    """

    scale: _T
    """f16 [O, J]."""
    offset: _T | None = None
    """f16 [O]."""
    lut: _T | None = None
    """int8 [classes, entries]; None where a code is its own value."""
    row_class: _T | None = None
    """u8, one for each row or tile of `TILE_ROWS` rows; None where there is one class."""
    segments: Sequence[int] | None = None
    """Channel counts of the J columns of ``scale``; None where there is one."""

    @property
    def operands(self) -> tuple[_T, _T | None, _T | None, _T | None]:
        """All parts but the segments, which stand elsewhere among the operands."""
        return self[:4]

    def map(self, read: Callable[[_T], _U]) -> WeightTables[_U]:
        """The tables with ``read(part)`` in place of each part that there is."""
        offset, lut, row_class = (None if part is None else read(part) for part in self[1:4])
        return WeightTables(read(self.scale), offset, lut, row_class, self.segments)


def row_parts(rows: Tensor) -> Iterator[slice]:
    """Parts of rows [O, ...], of about `TOGETHER` elements each, for what is done to every row by itself."""
    step = max(1, TOGETHER // max(1, math.prod(rows.shape[1:])))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def quantize(weight: Tensor, tables: WeightTables[Tensor]) -> Tensor:
    """Codes of the levels nearest to weight [O, K]; ties go to the lower level (8 bits: to the even code).

    u8 indices where there is a table, int8 values where there is none.
    """
    if tables.row_class is None and weight.numel() > TOGETHER and len(weight) > 1:
        return torch.cat([quantize(weight[part], _of_rows(tables, part)) for part in row_parts(weight)])
    scale, offset, lut, row_class, segments = tables
    shifted = weight if offset is None else weight - offset.to(torch.float32)[:, None]
    t = shifted / column_scale(scale, segments, weight.shape[1])
    if lut is None:
        return torch.round(t).clamp(-LUT_MAX, LUT_MAX).to(torch.int8)
    place, known = places(t), codes_at_places(lut)
    if lut.shape[0] > 1:
        assert row_class is not None
        place += (row_classes(row_class, len(weight)) * PLACES).to(torch.int32)[:, None]
    return known.flatten().index_select(0, place.flatten()).reshape(weight.shape)


def dequantize(codes: Tensor, tables: WeightTables[Tensor]) -> Tensor:
    """``scale[i, j(k)] * LUT[class(i)][code[i, k]] + offset[i]`` of codes [O, K], f32 [O, K]."""
    if tables.row_class is None and codes.numel() > TOGETHER and len(codes) > 1:
        return torch.cat([dequantize(codes[part], _of_rows(tables, part)) for part in row_parts(codes)])
    w = entries(codes, tables.lut, tables.row_class) * column_scale(tables.scale, tables.segments, codes.shape[1])
    return w if tables.offset is None else w + tables.offset.to(torch.float32)[:, None]


def _of_rows(tables: WeightTables[Tensor], part: slice) -> WeightTables[Tensor]:
    """The tables of some rows of a weight whose rows all have one class."""
    offset = None if tables.offset is None else tables.offset[part]
    return WeightTables(tables.scale[part], offset, tables.lut, None, tables.segments)


def nearest_codes(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    lut: Tensor | None,
    row_class: Tensor | None,
    segments: Sequence[int] | None = None,
) -> Tensor:
    """Quantizes a weight to the codes of the nearest levels; ties go to the lower level (8 bits: to the even code).

    Args:
        weight: f32 [O, K].
        scale: [O, J], one column for each K-segment.
        offset: [O], or None.
        lut: int8 [classes, entries]; None where the codes are the values.
        row_class: the table of each row or of each tile of 16 rows; None with one table.
        segments: the channel counts of the K-segments; None is one.

    Returns:
        Codes [O, K]: u8 indices with a table, int8 values without.
    """
    return quantize(weight, WeightTables(scale, offset, lut, row_class, segments))


def places(values: Tensor) -> Tensor:
    """The places of values among the halves of whole numbers, ``ceil(2 v)``, counted from that of `LUT_MAX` below 0.

    Entries of tables are whole, so that the middle between two is a half, and it is below a value where twice of it is
    below the value's place: of all values of a place the nearest level is the same. i32 0..`PLACES` - 1, as `values`.
    """
    return (values * 2).ceil_().clamp_(-ZERO_PLACE, ZERO_PLACE + 1).add_(ZERO_PLACE).to(torch.int32)


def codes_at_places(lut: Tensor) -> Tensor:
    """The code of the level that is nearest to the values of each place (`places`), u8 [classes, `PLACES`].

    Of two levels as near it is that of the lower one.
    """
    levels, order = rising(lut)
    twice = (levels[:, 1:] + levels[:, :-1]).contiguous()
    place = torch.arange(-2 * LUT_MAX, 2 * LUT_MAX + 2, dtype=torch.float32, device=lut.device).repeat(len(lut), 1)
    return order.gather(1, torch.searchsorted(twice, place)).to(torch.uint8)


def second_levels_at_places(lut: Tensor) -> Tensor:
    """The second nearest levels to the values of each place (`places`), f32 [classes, `PLACES`]; or infinity.

    They are the same for all values of a place, as the nearest one is.
    """
    levels, _ = rising(lut)
    middle = torch.arange(-2 * LUT_MAX, 2 * LUT_MAX + 2, dtype=torch.float32, device=lut.device) / 2 - 0.25
    others = levels[:, 1:].where(levels[:, 1:] != levels[:, :-1], torch.inf)  # FP4 has 0 twice
    found = torch.cat([levels[:, :1], others, levels.new_full((len(levels), 1), torch.inf)], 1)
    away = (found[:, None, :] - middle[:, None]).abs()
    return found.gather(1, away.topk(2, 2, largest=False, sorted=True).indices[..., 1])


def rising(lut: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts the levels of tables [classes, entries]: returns them in rising order, f32, and their codes, i64.

    The entries that pad a table come last and are infinite, so no value is nearest to them.
    """
    levels = torch.where(lut == NO_LEVEL, torch.inf, lut.to(torch.float32))
    order = torch.argsort(levels, dim=1, stable=True)
    return levels.gather(1, order), order


LUT_MAX = 127
"""The largest magnitude of a table entry and of an int8 code, the same on every target."""

PLACES = 4 * LUT_MAX + 2
"""The number of `places` that values can have among the levels of a table."""

ZERO_PLACE = 2 * LUT_MAX
"""The place of zero."""

NO_LEVEL = -128
"""The entry that pads a table with fewer levels than another one of the weight; no code refers to it."""

TILE_ROWS = 16
"""The number of rows (output channels) that share a row class, and with it a table."""


def float_bias(exponent: int) -> int:
    """The bias of a small float: it is subtracted from the value of its ``exponent`` bits."""
    return (1 << (exponent - 1)) - 1


def float_largest(exponent: int, bits: int) -> float:
    """The largest small float of ``bits`` bits, of which one is the sign and ``exponent`` are the exponent."""
    return (2 - 2.0 ** (1 + exponent - bits)) * 2.0 ** ((1 << exponent) - 1 - float_bias(exponent))


def round_float(x: Tensor, exponent: int, bits: int) -> Tensor:
    """Rounds x f32 to the nearest small float, ties to even; larger magnitudes become the largest float.

    The floats are those of `dequantize_float8`, with M = bits - 1 - exponent bits of mantissa. Let p be the largest
    power of two that is at most |x|, but at least the smallest normal float. The result is ``(x + c) - c`` in f32 with
    ``c = p * (1.5 * 2^(23 - M))``, around which f32 has the spacing of the small float (Dekker's constant).
    """
    largest = float_largest(exponent, bits)
    x = x.clamp(-largest, largest)
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    c = power.clamp_min(2.0 ** (1 - float_bias(exponent))) * (1.5 * 2.0 ** (24 + exponent - bits))
    return (x + c) - c


# --- weights ------------------------------------------------------------------------------------------------


def entries(codes: Tensor, lut: Tensor | None, row_class: Tensor | None) -> Tensor:
    """Looks codes [O, K] up: ``lut[class(i), code]`` as f32, or the codes themselves without a table."""
    if lut is None:
        return codes.to(torch.float32)
    table = lut.to(torch.float32)
    if lut.shape[0] == 1:
        return table[0].index_select(0, codes.flatten().int()).reshape(codes.shape)
    assert row_class is not None
    return table[row_classes(row_class, codes.shape[0])[:, None], codes.long()]


def row_classes(row_class: Tensor | None, rows: int) -> Tensor:
    """The class of each of ``rows`` rows, i64, given the classes of rows or of tiles of 16; all 0 for None."""
    if row_class is None:
        return torch.zeros(rows, dtype=torch.long)
    if len(row_class) == rows:
        return row_class.long()
    return row_class.long().repeat_interleave(TILE_ROWS)[:rows]


def class_bits(lut: Tensor) -> tuple[int, ...]:
    """The bits of a code of each table of lut [classes, entries]: just enough to number its levels."""
    return tuple((int(levels) - 1).bit_length() for levels in (lut != NO_LEVEL).sum(1))


def column_segments(segments: Sequence[int], columns: int) -> Tensor:
    """The K-segment of each of the ``columns`` of a row, i64; channels are split alike at every tap of a kernel."""
    of_channel = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(list(segments)))
    return of_channel.repeat(columns // len(of_channel))


def column_scale(scale: Tensor, segments: Sequence[int] | None, columns: int) -> Tensor:
    """Expands scale [O, J] to f32 that broadcasts over a weight [O, K]: each column has its segment's scale."""
    values = scale.to(torch.float32)
    if segments is None or len(segments) == 1:
        return values[:, :1]
    return values[:, column_segments(segments, columns).to(values.device)]


def merge_branch(codes: Tensor, lut: Tensor, signs: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Merges base and binary branch into one table: code' = 2*code + sign, LUT'[c, 2k+s] = LUT[c, k] +- alpha."""
    step = alpha.to(torch.int16)
    table = torch.stack([lut.to(torch.int16) - step, lut.to(torch.int16) + step], dim=-1).flatten(1)
    return codes * 2 + signs, table.to(torch.int8)


def dequantize_weight(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    lut: Tensor | None,
    row_class: Tensor | None,
    shape: Sequence[int],
    segments: Sequence[int] | None = None,
) -> Tensor:
    """Dequantizes a weight: ``scale[i, j(k)] * LUT[class(i)][code[i, k]] + offset[i]``.

    Args:
        codes: [O, K], indices into the table or int8 values.
        scale: [O, J], one column for each K-segment.
        offset: [O], or None.
        lut: int8 [classes, entries]; None where the codes are the values.
        row_class: the table of each row or of each tile of 16 rows; None with one table.
        shape: of the result, with O*K elements.
        segments: the channel counts of the K-segments; None is one.

    Returns:
        The weight, f32 of ``shape``.
    """
    return dequantize(codes, WeightTables(scale, offset, lut, row_class, segments)).reshape(list(shape))


def dequantize_float8(codes: Tensor, scale: Tensor, shape: Sequence[int], exponent: int = 4) -> Tensor:
    """Dequantizes FP8 codes: ``scale[i] * float8(code[i, k])``.

    A code is a sign, ``exponent`` bits e and M = 7 - exponent bits m. With the bias b = 2^(exponent-1) - 1 its value is
    ``(-1)^sign * 2^(max(e, 1) - b - M) * (m + (2^M if e > 0 else 0))``. All codes are finite (Kuzmin 2022, "FP8
    quantization: the power of the exponent", section 2): E4M3 and E5M2 are OCP's (arXiv 2209.05433) with numbers in
    place of infinities and NaNs.

    Args:
        codes: u8 [O, K].
        scale: [O].
        shape: of the result, with O*K elements.
        exponent: bits of exponent.

    Returns:
        The weight, f32 of ``shape``.
    """
    mantissa = 7 - exponent
    bits = codes.to(torch.int32)
    e, m = (bits >> mantissa) & (2**exponent - 1), bits & (2**mantissa - 1)
    significand = m + torch.where(e > 0, 2**mantissa, 0)
    power = e.clamp_min(1) - float_bias(exponent) - mantissa
    value = torch.ldexp(significand.to(torch.float32), power)
    value = torch.where(bits >= 128, -value, value) * scale.to(torch.float32)[:, None]
    return value.reshape(list(shape))
