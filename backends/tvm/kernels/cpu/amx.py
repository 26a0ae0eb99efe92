"""The tiles of Intel's matrix extensions (AMX): eight of 16 rows of 64 bytes, and what multiplies two of them.

A thread configures them before it uses any, and releases them when it is done, so that what switches threads need not
keep them. Numbers of tiles are immediates of the instructions. Source: Intel 64 and IA-32 Architectures Software
Developer's Manual, volume 2, TDPBUSD.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Index, store
from mpq_compiler.backends.tvm.kernels.cpu.isa import TILE_BYTES, TILE_ROWS

COUNT = 8
"""Tiles that there are."""
LEFT, RIGHT = (4, 5), (6, 7)
"""Numbers of the tiles of both operands; those of sums are before them (`sums`)."""
CONFIGURATION = 16
"""Size in int32 of the buffer that `configure` writes."""
PALETTE, BYTES_AT, ROWS_AT = 1, 16, 48
"""The first byte of a configuration, and where those of tile 0 are: u16 for the bytes of a row, u8 for the rows."""


def emit(name: str, *operands: Expr) -> None:
    """The instruction by LLVM's name. Its effects keep LLVM from moving it past another, or past loads and stores."""
    T.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *operands))


def configure(buffer: Buffer, shapes: Mapping[int, tuple[int, int]] = {}) -> None:
    """Makes all tiles whole ones, of zeros, but for the rows and bytes of those in ``shapes``.

    ``buffer`` is the memory that this is read from.
    """
    raw = bytearray(4 * CONFIGURATION)
    raw[0] = PALETTE
    for t in range(COUNT):
        raw[ROWS_AT + t], raw[BYTES_AT + 2 * t] = shapes.get(t, (TILE_ROWS, TILE_BYTES))
    for i in range(CONFIGURATION):
        word = int.from_bytes(raw[4 * i : 4 * i + 4], "little", signed=True)
        store(buffer, tirx.IntImm("int32", word), i)
    emit("ldtilecfg", T.address_of(buffer[0]))


def sums(left: int, right: int) -> int:
    """The tile for the sums of operand number ``left`` of `LEFT` and ``right`` of `RIGHT`."""
    return 2 * left + right


def release() -> None:
    """Gives all tiles up."""
    emit("tilerelease")


def zero(t: int) -> None:
    """Sets a tile to zeros."""
    emit("tilezero", _number(t))


def load(t: int, buffer: Buffer, at: Index, apart: int, passing: bool = False) -> None:
    """Loads the rows of a tile, the first from an index on, the others as many bytes apart; 0 makes all the same.

    passing: what is read will be out of the first cache before it is read again, and is not to push others out
    """
    name = "tileloaddt164" if passing else "tileloadd64"
    emit(name, _number(t), T.address_of(buffer[at]), tirx.IntImm("int64", apart))


def save(t: int, buffer: Buffer, at: Index, apart: int) -> None:
    """Stores the rows of a tile as `load` reads them."""
    emit("tilestored64", _number(t), T.address_of(buffer[at]), tirx.IntImm("int64", apart))


def dot(total: int, unsigned: int, signed: int) -> None:
    """Adds products of u8 and s8 to the sums in int32.

    Row m and lane n of them takes values 4 k + i of row m of the unsigned tile, times bytes 4 n + i of row k of the
    signed one.
    """
    emit("tdpbusd", _number(total), _number(unsigned), _number(signed))


def dot_signed(total: int, signed: int, unsigned: int) -> None:
    """Adds products of s8 and u8, as `dot` those of u8 and s8 (TDPBSUD)."""
    emit("tdpbsud", _number(total), _number(signed), _number(unsigned))


def dot_bfloat16(total: int, left: int, right: int) -> None:
    """Adds products of pairs of bfloat16 to the sums in float32, as `dot` does those of four bytes.

    First and second values of pairs are summed apart, rounded to nearest, and denormals are zeros (TDPBF16PS).
    """
    emit("tdpbf16ps", _number(total), _number(left), _number(right))


def _number(t: int) -> Expr:
    return tirx.IntImm("int8", t)
