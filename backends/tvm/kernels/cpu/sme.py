"""The outer products of Arm's matrix extension (SME2): four square tiles of 32-bit sums, and functions that use them.

A streaming vector has 512 bits here, `LENGTH` bytes: other lengths are refused before a kernel runs
(`targets.streaming`). What uses tiles is a function of its own, in streaming mode, of which most CPUs have neither NEON
nor gathers: loads, lookups, outer products and stores stand in it, and all else outside. Source: Arm Architecture
Reference Manual Supplement, the Scalable Matrix Extension (DDI 0616), USMOPA and LUTI4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm import DataType, tirx
from tvm.ir import Call, Expr, GlobalVar
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Index
from mpq_compiler.targets.streaming import LENGTH, SET_LENGTH

COUNT = 4
"""Tiles of 32-bit sums that there are."""
WORDS = LENGTH // 4
"""Rows of a tile, and its columns."""
EVERYTHING = 1 << 30
"""The size of a buffer whose own is not known where it is read."""


def emit(name: str, *operands: Expr) -> None:
    """The instruction by LLVM's name."""
    T.evaluate(tirx.call_llvm_intrin("void", f"llvm.aarch64.sme.{name}", *operands))


class Functions:
    """The functions in streaming mode that a kernel calls.

    made: each by the variable that it is called by
    """

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel
        self.made: dict[GlobalVar, PrimFunc] = {}

    def call(
        self,
        body: Callable[[dict[str, Buffer], dict[str, Any]], None],
        pointers: Mapping[str, tuple[Buffer, Index]],
        numbers: Mapping[str, Index],
    ) -> None:
        """Makes a function with tiles of its own, and calls it.

        Args:
            body: emits it, of buffers and numbers by their names. All that is not known now has to be among them.
            pointers: what the buffers of the function are: others, from an element on.
            numbers: int32.
        """
        name = f"{self._kernel}_tiles{len(self.made)}"
        with IRBuilder() as builder, T.prim_func(s_tir=False, is_private=True):
            T.func_name(name)
            data = {key: T.arg(key, T.handle(buffer.dtype, "global")) for key, (buffer, _) in pointers.items()}
            given = {key: T.arg(key, T.int32()) for key in numbers}
            buffers = {
                key: T.decl_buffer((EVERYTHING,), buffer.dtype, data=data[key], align=4)
                for key, (buffer, _) in pointers.items()
            }
            # LLVM makes SMSTART and SMSTOP of the mode; TVM's attribute for tiles it does not know any more.
            with T.attr(T.int32(0), "pragma_aarch64_pstate_sm", "body"):
                emit("za.enable")
                body(buffers, given)
                emit("za.disable")
        variable = GlobalVar(name)
        self.made[variable] = builder.get()
        operands = [*(T.address_of(buffer[at]) for buffer, at in pointers.values())]
        operands += [T.cast(n, "int32") if isinstance(n, Expr) else T.int32(n) for n in numbers.values()]
        T.evaluate(Call(variable, operands, ret_ty="void"))


def require_length() -> None:
    """Asks for vectors of `LENGTH` bytes where the thread has others, as Linux starts threads."""
    have = tirx.call_llvm_pure_intrin("int64", "llvm.aarch64.sme.cntsd")
    with T.If(have != LENGTH // 8), T.Then():
        T.evaluate(T.call_extern("int32", "prctl", T.int32(SET_LENGTH), *(T.int64(n) for n in (LENGTH, 0, 0, 0))))


def zero() -> None:
    """Sets all tiles to zeros."""
    emit("zero", T.int32(255))


def dot(total: int, unsigned: Expr, signed: Expr) -> None:
    """Adds products of u8 and s8 to the sums of a tile in int32.

    Row m and column n of them takes bytes 4 m + i of the unsigned vector times 4 n + i of the signed one.
    """
    emit("usmopa.wide", T.int32(total), _every(1), _every(1), unsigned, signed)


def add_to_rows(total: int, words: Expr) -> None:
    """Adds a vector of int32 to every row of a tile."""
    emit("addha.nxv4i32", T.int32(total), _every(4), _every(4), words)


def load(total: int, row: Expr, buffer: Buffer, at: Index) -> None:
    """Sets a row of a tile to neighbouring int32."""
    emit("ld1w.horiz", _every(4), T.address_of(buffer[at]), T.int32(total), row)


def save(total: int, row: Expr, buffer: Buffer, at: Index) -> None:
    """Stores a row of a tile."""
    emit("st1w.horiz", _every(4), T.address_of(buffer[at]), T.int32(total), row)


def vector(buffer: Buffer, at: Index) -> Expr:
    """`LENGTH` bytes of a buffer from an element on."""
    return T.bind(buffer[T.ramp(at, 1, _lanes(DataType(buffer.dtype).bits // 8))])


def look_up(bits: int, codes: Expr, part: int) -> Expr:
    """The int8 that the low bytes of the table (`set_table`) have for the codes of a part of a vector."""
    name = f"llvm.aarch64.sme.luti{bits}.lane.zt"
    return T.bind(tirx.call_llvm_intrin("int8xvscalex16", name, T.int32(0), codes, T.int32(part)))


def set_table(table: Buffer, at: Index) -> None:
    """Loads 16 int32, of whose low bytes `look_up` takes its values."""
    emit("ldr.zt", T.int32(0), T.address_of(table[at]))


def _lanes(size: int) -> Expr:
    """The elements of so many bytes that a vector has, as LLVM counts them: in multiples of those in 128 bits."""
    return 16 // size * T.vscale()


def _every(size: int) -> Expr:
    """A predicate of all elements of so many bytes."""
    return T.broadcast(T.bool(True), _lanes(size))
