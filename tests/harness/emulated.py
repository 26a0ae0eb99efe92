"""Kernels of the target with AMX on any x86 CPU: tile instructions are calls of tiles.c, the rest is code for AVX2."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Index, span
from mpq_compiler.backends.tvm.kernels.cpu import amx, bfloat16
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS, Isa
from mpq_compiler.targets.table import TARGETS

TARGET = "x86-64-amx"


class EmulatedIsa(Isa):
    """The ISA of the target, in instructions that every CPU of x86-64-v3 has."""

    def target(self) -> dict:
        return dict(TARGETS["x86-64-avx2"].tvm)

    def dot(self, acc: Expr, activations: Expr, weights: Expr) -> Expr:
        wide = f"int32x{self.vector}"
        products = tirx.Cast(wide, activations) * tirx.Cast(wide, weights)
        for i in range(self.kpack):
            acc = acc + _picked(products, range(i, self.vector, self.kpack))
        return acc

    def dot_words(self, total: Expr, unsigned: Expr, signed: Expr) -> Expr:
        count = vmath.lanes(total)
        for place in (24, 16, 8, 0):
            left, right = (tirx.shift_left(word, vmath.i32(place, count)) for word in (unsigned, signed))
            left = tirx.bitwise_and(tirx.shift_right(left, vmath.i32(24, count)), vmath.i32(255, count))
            total = total + left * tirx.shift_right(right, vmath.i32(24, count))
        return total

    def fraction(self, x: Expr) -> Expr:
        return x - tirx.floor(x)

    def scaled(self, value: Expr, x: Expr) -> Expr:
        whole = vmath.cast(tirx.floor(vmath.at_least(x, vmath.f32(-127.0, vmath.lanes(x)))), "int32")
        bits = tirx.shift_left(whole + vmath.i32(127, vmath.lanes(x)), vmath.i32(23, vmath.lanes(x)))
        return vmath.mul(value, vmath.as_float(bits))  # zeros for denormals

    def product(self, values: Expr, factor: Expr, most: int) -> Expr:
        return values * tirx.Broadcast(factor, self.lanes)

    def look_up(self, table: Expr, indices: Expr) -> Expr:
        signed, parts = tirx.reinterpret(f"int8x{self.vector}", indices), []
        for at in range(0, self.vector, 16):
            own, by = (_picked(vector, range(at, at + 16)) for vector in (table, signed))
            parts.append(tirx.call_llvm_pure_intrin("int8x16", "llvm.x86.ssse3.pshuf.b.128", own, by))
        return tirx.Shuffle(parts, [tirx.IntImm("int32", i) for i in range(self.vector)])


def _picked(vector: Expr, lanes: range) -> Expr:
    return tirx.Shuffle([vector], [tirx.IntImm("int32", i) for i in lanes])


@functools.cache
def _load_tiles() -> ctypes.CDLL:
    """The functions of tiles.c, where those that are compiled just in time find them."""
    compiler = shutil.which("cc") or pytest.skip("not installed: a C compiler")
    folder = tempfile.mkdtemp(prefix="mpq-tiles-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library, source = Path(folder, "tiles.so"), Path(__file__).with_name("tiles.c")
    command = [compiler, "-O2", "-Wall", "-Werror", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _call(name: str, *operands: Expr) -> None:
    T.evaluate(T.call_extern("int32", f"mpq_{name}", *operands))


def _words(x: Buffer, row: tuple[Index, ...], start: Index, count: int) -> Expr:
    """`bfloat16.words` in integers."""
    values = vmath.keep(x[(*row, span(start, 2 * count))])
    return bfloat16.pair(*(bfloat16.rounded(_picked(values, range(i, 2 * count, 2))) for i in range(2)))


@contextmanager
def emulated() -> Iterator[Isa]:
    """The ISA; kernels that are built within have calls in the places of tile instructions."""
    _load_tiles()
    own = ISAS[TARGET]
    isa = EmulatedIsa(**{field.name: getattr(own, field.name) for field in fields(own)})
    with (
        mock.patch.object(amx, "emit", _call),
        mock.patch.object(bfloat16, "instructions", nullcontext),
        mock.patch.object(bfloat16, "words", _words),
        mock.patch.dict(ISAS, {TARGET: isa}),
    ):
        yield isa
