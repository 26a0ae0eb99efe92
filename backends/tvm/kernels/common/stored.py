"""The stored form of weights: what reads their codes from a stream (`formats.packing`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, scratch, store


def stored_code(codes: Buffer, index: Any, bits: int, count: int) -> Expr:
    """The code at `index` of a stored stream of `count` (`formats.packing`), int32: unsigned below 8 bits."""
    if bits == 8:
        return T.cast(tirx.reinterpret("int8", codes[index]), "int32")
    if bits not in (3, 5):
        return _field(codes, index * bits, bits)
    low = bits - 1  # in a plane of their own; the highest bits follow in another
    return _field(codes, index * low, low) | _field(codes, low * count + index, 1) << low


def _field(codes: Buffer, bit: Any, width: int) -> Expr:
    """`width` bits from number `bit` of a stream on, within a byte."""
    return T.cast(codes[bit // 8], "int32") >> (bit % 8) & ((1 << width) - 1)


class StoredRows:
    """Reads the codes of a stored weight [rows, columns], one row after the other from row `begin` on.

    widths: the bits of a code by class of row (`formats.packing.pack_rows`); nothing where all have `bits`
    """

    def __init__(self, b: Buffers, shape: tuple[int, int], bits: int, widths: Sequence[int], begin: Any) -> None:
        self.b, (self.rows, self.columns), self.extra = b, shape, range(1, len(widths))
        self.bits = widths[0] if widths else bits
        if not widths:
            return
        self.first = scratch(len(widths), "int32")
        """The bit of the stream where the extra bits of the row begin, by class that has them."""
        for c in self.extra:
            store(self.first, tirx.IntImm("int32", self.bits * self.rows * self.columns), c)
        with T.serial(0, self.rows) as i:
            own = T.bind(self.class_of(i))
            for c in self.extra:  # behind those of fewer bits, and of the rows before
                before = T.min(own, c - 1) + tirx.Select(tirx.all(own >= c, i < begin), 1, 0)
                store(self.first, self.first[c] + before * self.columns, c)

    def class_of(self, i: Any) -> Expr:
        """The class of row i, int32, from 2 bits."""
        return T.cast(self.b["row_class"][i // 4], "int32") >> (i % 4 * 2) & 3

    def places(self, place: Buffer, i: Expr, entries: int) -> None:
        """Writes the place in the last table of each level of row i, where all rows are looked up in that one."""
        tables, last, own = self.b["tables"], len(self.extra), T.bind(self.class_of(i))
        with T.serial(0, entries) as code:
            store(place, tirx.IntImm("int32", 0), code)
            with T.serial(0, entries) as entry:
                store(place, place[code] + T.cast(tables[last, entry] < tables[own, code], "int32"), code)

    @contextmanager
    def row(self, i: Any) -> Iterator[Callable[[Any], Expr]]:
        """The code of row i by column, int32."""
        own: Any = T.bind(self.class_of(i)) if self.extra else 0

        def code(column: Any) -> Expr:
            found = stored_code(self.b["codes"], i * self.columns + column, self.bits, self.rows * self.columns)
            for c in self.extra:
                more = _field(self.b["codes"], self.first[c] + column, 1) << (self.bits + c - 1)
                found = found | T.if_then_else(own >= c, more, 0)
            return found

        yield code
        for c in self.extra:
            store(self.first, self.first[c] + tirx.Select(own >= c, self.columns, 0), c)
