"""Emits stored tensors: reads of the artifact's weight file, and the nodes that decode their values.

ONNX has no 2-, 3- or 5-bit integers and no tables. Nodes that read nothing but stored tensors decode such weights to
int8, and onnxruntime folds them when it loads a model. So the file is as small as the plan says for every width, and
the integer kernels read int8 (`Weights.decoded` lists these weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mpq_compiler.backends.onnx.graph import ELEMENT, Graph
from mpq_compiler.formats import contract
from mpq_compiler.formats.packing import unpack_codes
from mpq_compiler.ir.stored_tensors import CLASS_BITS, Stored


class Weights:
    """Emits reads of stored tensors by name; ``places`` has each one's byte range in the weight file."""

    def __init__(self, graph: Graph, stored: Mapping[str, Stored], places: Mapping[str, tuple[int, int]]) -> None:
        self.graph, self.stored, self.places = graph, stored, places
        self._decoded: set[str] = set()

    def raw(self, name: str) -> str:
        """Reads a tensor as it is stored: codes of 4 and 8 bits in their shape, other widths as bytes."""
        tensor = self.stored[name]
        dtype, shape = str(tensor.array.dtype), tensor.array.shape
        if tensor.shape is not None and tensor.bits in (4, 8):
            dtype, shape = {4: "uint4", 8: "int8"}[tensor.bits], tensor.shape
        if not tensor.array.nbytes:
            return self.graph.constant(tensor.array, dtype)
        return self.graph.external(name, dtype, shape, *self.places[name])

    def read(self, name: str) -> str:
        """Reads a tensor as the program sees it, with half-precision floats converted to f32."""
        raw = self.raw(name)
        return self.graph.op("Cast", raw, to=ELEMENT["float32"]) if self.stored[name].array.dtype == np.float16 else raw

    def levels(self, codes: str, lut: str | None, row_class: str | None) -> tuple[str, int]:
        """Decodes a weight: i8 [O, K] and a zero, whose difference is exactly what `contract.entries` returns.

        Consecutive entries need no table, since their codes count from the first entry.
        """
        if lut is None:
            return self.raw(codes), 0
        self._decoded.add(codes)
        table = self.stored[lut].array
        first = int(table[0, 0])
        if len(table) == 1 and np.array_equal(table[0], np.arange(first, first + table.shape[1])) and first <= 0:
            return self._codes(codes, "int8"), -first
        index = self._codes(codes, "int32")
        if row_class is not None and len(table) > 1:
            index = self.graph.op("Add", index, self._first_entries(row_class, table.shape[1], self._shape(codes)[0]))
        return self.graph.op("Gather", self.graph.op("Reshape", self.raw(lut), self.graph.ints(-1)), index), 0

    def decoded(self) -> dict[str, str]:
        """Sentences, by width, on weights that take more bytes in memory than in the file."""
        said = {}
        labels = {name: f"{self.stored[name].bits}-bit" for name in sorted(self._decoded)}
        labels |= {name: "mixed-width" for name in labels if self.stored[name].row_class}
        for label in sorted({*labels.values()}):
            names = [name for name in labels if labels[name] == label]
            held = sum(self.stored[name].array.nbytes for name in names)
            values = sum(math.prod(self._shape(name)) for name in names)
            said[f"{label} weights"] = (
                f"onnxruntime decodes those of {len(names)} layers to int8 when it loads the model: "
                f"{held} bytes in the file, {values} in memory"
            )
        return said

    def _first_entries(self, row_class: str, entries: int, rows: int) -> str:
        """The place in the concatenated tables where each row's table begins, i32 [O, 1]."""
        g = self.graph
        if self.stored[row_class].bits is not None:  # every row has a class of its own
            first = g.op("Mul", self._codes(row_class, "int32"), g.constant(entries, "int32"))
            return g.op("Reshape", first, g.ints(-1, 1))
        first = g.op("Mul", g.op("Cast", self.raw(row_class), to=ELEMENT["int32"]), g.constant(entries, "int32"))
        tiles = g.op("Expand", g.op("Reshape", first, g.ints(-1, 1)), g.ints(1, contract.TILE_ROWS))
        return g.op("Slice", g.op("Reshape", tiles, g.ints(-1, 1)), g.ints(0), g.ints(rows), g.ints(0))

    def _shape(self, codes: str) -> tuple[int, ...]:
        shape = self.stored[codes].shape
        assert shape is not None, f"'{codes}' holds no codes"
        return shape

    def _codes(self, name: str, dtype: str) -> str:
        """Decodes codes [O, K] below 32 to int8 or int32."""
        g, bits, shape = self.graph, self.stored[name].bits, self._shape(name)
        if bits == 4:
            return g.op("Cast", self.raw(name), to=ELEMENT[dtype])
        assert bits in (1, 2, 3, 5)
        low, count = max(1, bits - bits % 2), math.prod(shape)
        flat = self._plane(name, count, 0, low, 0)
        if low < bits:
            flat = g.op("BitwiseOr", flat, self._plane(name, count, low, 1, low * count))
        codes = g.op("Reshape", flat, g.ints(*shape))
        if self.stored[name].row_class is not None:
            codes = self._extended(name, codes, bits)
        return g.op("Cast", codes, to=ELEMENT[dtype])

    def _extended(self, name: str, codes: str, bits: int) -> str:
        """Completes codes u8 [O, K] of rows of several widths: adds the bits that only some rows have."""
        g, (rows, columns) = self.graph, self._shape(name)
        classes = unpack_codes(self.stored[str(self.stored[name].row_class)].array, (rows,), CLASS_BITS)
        begin = bits * rows * columns
        for c in range(1, int(classes.max()) + 1):
            chosen = classes >= c
            count = int(chosen.sum())
            plane = g.op("Reshape", self._plane(name, count * columns, bits + c - 1, 1, begin), g.ints(count, columns))
            padded = g.op("Concat", plane, g.constant(np.zeros((1, columns)), "uint8", "none"), axis=0)
            place = g.constant(np.where(chosen, chosen.cumsum() - 1, count), "int32", "rows")
            codes = g.op("BitwiseOr", codes, g.op("Gather", padded, place))
            begin += count * columns
        return codes

    def _plane(self, name: str, count: int, first: int, width: int, begin: int) -> str:
        """Decodes a plane of codes (formats/packing.py): bits first .. first + width of ``count`` codes, u8 [count].

        The plane begins at bit ``begin`` of the stream. A table maps each byte to the bits of codes in it.
        """
        g = self.graph
        stream, last = self.raw(name), -(-(begin + count * width) // 8)
        if (begin // 8, last) != (0, self.stored[name].array.size):
            stream = g.op("Slice", stream, g.ints(begin // 8), g.ints(last), g.ints(0))
        values = np.arange(256)[:, None] >> np.arange(0, 8, width) & (1 << width) - 1
        table = g.constant(values << first, "uint8", f"bits{first}..{first + width}")
        flat = g.op("Reshape", g.op("Gather", table, g.op("Cast", stream, to=ELEMENT["int32"])), g.ints(-1))
        lead = begin % 8 // width
        return g.op("Slice", flat, g.ints(lead), g.ints(lead + count), g.ints(0))
