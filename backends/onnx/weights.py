"""Stored tensors in the graph: the bytes of the artifact's weight file, and how the values are made from them.

ONNX has no 2-, 3- or 5-bit integers and no tables. Nodes that read nothing but stored tensors make the int8 values of
such weights; onnxruntime folds them when it loads a model, so that a file of any width is as small as the plan says and
the integer kernels read int8.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mpq_compiler import ops
from mpq_compiler.backends.onnx.graph import Graph
from mpq_compiler.storage import Stored


class Weights:
    """Reads of ``stored`` by name; ``places`` says where in the weight file each tensor lies."""

    def __init__(self, graph: Graph, stored: Mapping[str, Stored], places: Mapping[str, tuple[int, int]]) -> None:
        self.graph, self.stored, self.places = graph, stored, places

    def raw(self, name: str) -> str:
        """The tensor as it is stored; codes of 4 and 8 bits in their shape, other widths as bytes."""
        tensor = self.stored[name]
        dtype, shape = str(tensor.array.dtype), tensor.array.shape
        if tensor.shape is not None and tensor.bits in (4, 8):
            dtype, shape = {4: "uint4", 8: "int8"}[tensor.bits], tensor.shape
        if not tensor.array.nbytes:
            return self.graph.constant(tensor.array, dtype)
        return self.graph.external(name, dtype, shape, *self.places[name])

    def read(self, name: str) -> str:
        """The value that the program sees: half-precision floats as f32."""
        raw = self.raw(name)
        return self.graph.op("Cast", raw, to=_FLOAT) if self.stored[name].array.dtype == np.float16 else raw

    def levels(self, codes: str, lut: str | None, row_class: str | None) -> tuple[str, int]:
        """(i8 [O, K], zero): what `ops.entries` gives is the difference, exactly.

        Consecutive entries need no table: their codes count from the first.
        """
        if lut is None:
            return self.raw(codes), 0
        table = self.stored[lut].array
        first = int(table[0, 0])
        if len(table) == 1 and np.array_equal(table[0], np.arange(first, first + table.shape[1])) and first <= 0:
            return self._codes(codes, "int8"), -first
        index = self._codes(codes, "int32")
        if row_class is not None and len(table) > 1:
            index = self.graph.op("Add", index, self._first_entries(row_class, table.shape[1], self._shape(codes)[0]))
        return self.graph.op("Gather", self.graph.op("Reshape", self.raw(lut), self.graph.ints(-1)), index), 0

    def _first_entries(self, row_class: str, entries: int, rows: int) -> str:
        """i32 [O, 1]: where the table of each row begins in all tables one behind the other."""
        g = self.graph
        first = g.op("Mul", g.op("Cast", self.raw(row_class), to=_INT32), g.constant(entries, "int32"))
        tiles = g.op("Expand", g.op("Reshape", first, g.ints(-1, 1)), g.ints(1, ops.TILE_ROWS))
        return g.op("Slice", g.op("Reshape", tiles, g.ints(-1, 1)), g.ints(0), g.ints(rows), g.ints(0))

    def _shape(self, codes: str) -> tuple[int, ...]:
        shape = self.stored[codes].shape
        assert shape is not None, f"'{codes}' holds no codes"
        return shape

    def _codes(self, name: str, dtype: str) -> str:
        """Codes [O, K] as int8 or int32."""
        g, bits, shape = self.graph, self.stored[name].bits, self._shape(name)
        element = {"int8": _INT8, "int32": _INT32}[dtype]
        if bits in (4, 8):
            return g.op("Cast", self.raw(name), to=element)
        assert bits in (2, 3, 5)
        count = int(np.prod(shape))
        flat = self._plane(name, count, 0, 4 if bits == 5 else 2, 0)
        if bits != 2:
            flat = g.op("BitwiseOr", flat, self._plane(name, count, count * (bits - 1), 1, bits - 1))
        return g.op("Cast", g.op("Reshape", flat, g.ints(*shape)), to=element)

    def _plane(self, name: str, count: int, begin: int, width: int, shift: int) -> str:
        """u8 [count]: values of ``width`` bits from bit ``begin`` of the stream on (formats/packing.py), shifted left.

        A table says what the bits of each byte are.
        """
        g = self.graph
        end = begin + count * width
        stream = self.raw(name)
        if (begin // 8, -(-end // 8)) != (0, len(self.stored[name].array)):
            stream = g.op("Slice", stream, g.ints(begin // 8), g.ints(-(-end // 8)), g.ints(0))
        parts = np.arange(256)[:, None] >> np.arange(0, 8, width)
        table = g.constant((parts & (1 << width) - 1) << shift, "uint8", f"bits{width}<<{shift}")
        flat = g.op("Reshape", g.op("Gather", table, g.op("Cast", stream, to=_INT32)), g.ints(-1))
        lead = begin % 8 // width
        return g.op("Slice", flat, g.ints(lead), g.ints(lead + count), g.ints(0))


_FLOAT, _INT8, _INT32 = 1, 3, 6
"""Element types of onnx.TensorProto."""
