"""Decodes entropy-coded weights (`support.rans`), once, when an artifact is loaded.

Whatever the bytes are, nothing is read beyond their end: places are held within what is there, and streams that do not
end where they should end the call with an error.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, Index, primfunc, scratch, shares, store
from mpq_compiler.backends.tvm.kernels.problems.rans import DecodeRans, arguments
from mpq_compiler.support import rans

NANOSECONDS = 4
"""What an integer takes, about."""
DAMAGED = "an entropy-coded weight is damaged: copy or compile the artifact again"


def build(problem: DecodeRans, isa: str, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem))``."""

    def body(_: Index, buffers: Buffers) -> None:
        """All streams, which threads share."""
        _Decoder(problem, buffers["coded"], buffers["codes"]).emit()

    return primfunc(name, arguments(problem), body)


class _Decoder:
    def __init__(self, problem: DecodeRans, coded: Buffer, codes: Buffer) -> None:
        self.count, self.size, self.bits = problem.count, problem.size, problem.bits
        self.coded, self.codes = coded, codes
        self.streams = rans.streams(problem.count)

    def emit(self) -> None:
        """Each thread makes a table of its own, which takes as long as some thousands of integers."""
        self.sound = scratch(self.streams, "int32", heap=True)  # of all threads: none of them can end the call
        with shares(1, self.streams, NANOSECONDS * self.count) as (_, begin, end):
            symbols = T.bind(self._byte(1) + 1)
            self.low = T.bind(T.cast(tirx.reinterpret("int8", self.coded[0]), "int32"))
            self.table = scratch(rans.TOTAL, "uint32", heap=True)
            whole = T.bind(self._fill(symbols))
            self.ends = T.bind(2 + 2 * symbols)
            self.states = T.bind(self.ends + 4 * self.streams)
            self.words = T.bind(self.states + 4 * rans.LANES * self.streams)
            self.last = T.bind(tirx.truncdiv(self.size - self.words, 2) - rans.LANES)
            whole = T.bind(tirx.all(whole, self.last >= 0))
            with T.serial(begin, end) as stream:
                store(self.sound, T.int32(0), stream)
                with T.If(whole), T.Then():
                    self._stream(stream)
        sound = scratch(1, "int32")
        store(sound, T.int32(1), 0)
        with T.serial(0, self.streams) as stream:
            store(sound, sound[0] & self.sound[stream], 0)
        with T.Assert(sound[0] == 1, DAMAGED):
            T.evaluate(0)

    def _fill(self, symbols: Index) -> Expr:
        """Sets the table: of each slot the integer above ``low``, its frequency less 1, and its place among its own.

        Returns whether the frequencies have their sum, and the integers are in -127..127.
        """
        with T.serial(0, rans.TOTAL) as slot:
            store(self.table, tirx.const(0, "uint32"), slot)
        at, left = scratch(1, "int32"), scratch(1, "int32")
        store(at, T.int32(0), 0)
        with T.serial(0, symbols) as symbol:
            frequency = self._unsigned(2 + 2 * symbol, 2)
            store(left, T.min(T.cast(frequency, "int32"), rans.TOTAL - at[0]), 0)
            own = T.bind(left[0])
            first = T.bind(at[0])
            with T.serial(0, own) as place:
                entry = T.cast(symbol, "uint32") | T.cast(own - 1, "uint32") << tirx.const(8, "uint32")
                store(self.table, entry | T.cast(place, "uint32") << tirx.const(20, "uint32"), first + place)
            store(at, first + own, 0)
        return tirx.all(at[0] == rans.TOTAL, self.low >= -127, self.low + symbols <= 128)

    def _stream(self, stream: Index) -> None:
        """Decodes a stream, and notes whether it ends where it should."""
        begin = T.Select(stream > 0, self._unsigned(self.ends + 4 * (T.max(stream, 1) - 1), 4), tirx.const(0, "uint32"))
        end = T.bind(self._within(self._unsigned(self.ends + 4 * stream, 4)))
        place = scratch(1, "int32")
        store(place, T.min(self._within(begin), end), 0)
        states = scratch(rans.LANES, "uint32")
        for lane in range(rans.LANES):
            store(states, self._unsigned(self.states + 4 * (stream * rans.LANES + lane), 4), lane)
        self.even = scratch(1, "int32")
        first = T.bind(stream * rans.STREAM)
        size = T.bind(T.min(self.count - first, rans.STREAM))

        def one(i: Index, lane: int) -> None:
            """Decodes integer i of the stream, whose lane says whether its number is even."""
            state = T.bind(states[lane])
            entry = T.bind(self.table[T.cast(state & tirx.const(rans.TOTAL - 1, "uint32"), "int32")])
            code = T.cast(entry & tirx.const(255, "uint32"), "int32") + self.low
            if self.bits == 8:
                store(self.codes, T.cast(code, "uint8"), first + i)
            elif lane % 2 == 0:
                store(self.even, code + 8 & 15, 0)
                store(self.codes, T.cast(self.even[0], "uint8"), tirx.truncdiv(first + i, 2))
            else:
                both = self.even[0] | (code + 8 & 15) << 4
                store(self.codes, T.cast(both, "uint8"), tirx.truncdiv(first + i, 2))
            frequency = (entry >> tirx.const(8, "uint32") & tirx.const(rans.TOTAL - 1, "uint32")) + 1
            moved = T.bind(frequency * (state >> tirx.const(rans.BITS, "uint32")) + (entry >> tirx.const(20, "uint32")))
            reads = T.bind(moved < tirx.const(rans.LEAST, "uint32"))
            pair = self.coded[T.ramp(self.words + 2 * place[0], 1, 2)]
            word = T.cast(tirx.reinterpret("uint16", pair), "uint32")
            store(states, T.Select(reads, moved << tirx.const(16, "uint32") | word, moved), lane)
            store(place, place[0] + T.cast(reads, "int32"), 0)

        groups = T.bind(tirx.truncdiv(size, rans.LANES))
        with T.serial(0, groups) as group:
            for lane in range(rans.LANES):
                one(group * rans.LANES + lane, lane)
            store(place, T.min(place[0], end), 0)  # behind it are as many words as lanes read
        for lane in range(rans.LANES - 1):
            with T.If(groups * rans.LANES + lane < size), T.Then():
                one(groups * rans.LANES + lane, lane)
        last = T.bind(T.cast(self.low + rans.last_state(0), "uint32"))
        done = [states[lane] == last for lane in range(rans.LANES)]
        store(self.sound, T.cast(tirx.all(place[0] == end, *done), "int32"), stream)

    def _within(self, place: Expr) -> Expr:
        """A word's number, u32, held within 0 .. ``last``; numbers of 2^31 and more would be negative."""
        return T.cast(T.min(place, T.cast(self.last, "uint32")), "int32")

    def _byte(self, at: Index) -> Expr:
        """A byte, int32; the last one where there are fewer."""
        return T.cast(self.coded[T.min(at, self.size - 1)], "int32")

    def _unsigned(self, at: Index, count: int) -> Expr:
        """So many bytes, the least first, as u32."""
        value = tirx.const(0, "uint32")
        for i in range(count):
            value = value | T.cast(self.coded[T.min(at + i, self.size - 1)], "uint32") << tirx.const(8 * i, "uint32")
        return T.bind(value)
