"""What kernel templates share: functions, buffers, loops over vectors and over the shares of threads.

A template is plain Python that drives TVM's IR builder. A *problem* (a frozen dataclass of `kernels.problems`) holds
all static facts; ``arguments(problem)`` beside it lists the buffers in calling order, outputs last; and
``build(problem, isa, name)`` of `kernels.cpu` or ``build(problem, name)`` of `kernels.cuda` makes the PrimFunc. The
batch ``B`` is the only symbolic size.

Vectors are 16 lanes everywhere; LLVM splits them on narrower machines. `isa` (``Target.isa``, or the name of
a target) chooses tile sizes only: no result depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tvm import DataType, IRModule, tirx
from tvm.ir import Expr, GlobalVar, PointerType, PrimType
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument, Shape
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES, width

CPU = 1  # kDLCPU
SHARES = 16
"""Parts of a sample's work: divisible by most numbers of cores."""
WORTH_SHARING = 8000
"""Nanoseconds of work on a sample: to wake another thread and to wait for it takes three thousand."""
Buffer = Any
Buffers = dict[str, Buffer]
Index = Expr | int
"""A number that is known now, or when the kernel runs."""


def primfunc(
    name: str, arguments: Sequence[Argument], body: Callable[[Any, Buffers], None], s_tir: bool = True
) -> PrimFunc:
    """The PrimFunc ``name(arguments...)``; `body` receives the batch size and the buffers by name.

    s_tir: TVM's passes rearrange it; without, what is written is what is run.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=s_tir):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        handles = [T.arg(f"{argument.name}_handle", T.handle()) for argument in arguments]
        batch = T.int32()
        IRBuilder.name("batch", batch)
        buffers = {}
        for argument, handle in zip(arguments, handles, strict=True):
            shape = [batch if extent == BATCH else extent for extent in argument.shape]
            buffer = T.match_buffer(handle, shape, argument.dtype, align=64)
            IRBuilder.name(argument.name, buffer)
            buffers[argument.name] = buffer
        body(batch, buffers)
    return builder.get()


FUNCTIONS = "mpq.functions"
"""The attribute of a kernel with the functions that it calls."""


def with_functions(kernel: PrimFunc, functions: Mapping[GlobalVar, PrimFunc]) -> PrimFunc:
    """The kernel with the functions that it calls, for `module`."""
    return kernel.with_attr(FUNCTIONS, dict(functions)) if functions else kernel


def module(kernels: Mapping[str, PrimFunc]) -> IRModule:
    """What TVM compiles: kernels by name, and the functions that they call."""
    functions: dict[Any, PrimFunc] = {}
    for name, kernel in kernels.items():
        called = kernel.attrs.get(FUNCTIONS)
        functions |= dict(called.items()) if called else {}
        functions[name] = kernel.without_attr(FUNCTIONS) if called else kernel
    return IRModule(functions)


def register_file(isa: str) -> str:
    """``wide`` for 32 registers of 16 lanes (AVX-512), ``narrow`` for about 8 vectors of 16 lanes.

    AVX2 has 16 registers of 8 lanes, NEON 32 of 4.
    """
    return "wide" if "avx512" in isa or "amx" in isa else "narrow"


def scratch(size: int, dtype: str = "float32", *, heap: bool = False) -> Buffer:
    """An uninitialised local buffer: on the stack (registers, where LLVM can), or from the workspace pool."""
    return T.alloc_buffer((size,), dtype, align=64, **({} if heap else vmath.local()))


class Registers:
    """Vectors that LLVM keeps in registers: ``r[i] = value``, uninitialised before.

    Each is a buffer of its own. One of a kilobyte and more TVM takes from the workspace pool where threads share a
    loop, whatever `scratch` asks for, and what is stored to it goes to memory.
    """

    def __init__(self, count: int, lanes: int, dtype: str = "float32") -> None:
        self._whole = span(0, lanes)
        self._vectors = [scratch(lanes, dtype) for _ in range(count)]

    def __getitem__(self, i: int) -> Expr:
        return self._vectors[i][self._whole]

    def __setitem__(self, i: int, value: Expr) -> None:
        store(self._vectors[i], value, self._whole)

    def __len__(self) -> int:
        return len(self._vectors)


class Shared:
    """A loop that threads share, and memory that each of them has of its own (`shared` yields it)."""

    def __init__(self, serial: bool) -> None:
        self.serial = serial
        self.workspaces: list[Any] = []

    def loop(self, begin: Any, end: Any) -> Any:
        """The loop of the region, for a ``with`` statement."""
        return T.serial(begin, end) if self.serial else T.parallel(begin, end)

    def workspace(self, size: int, dtype: str = "float32") -> Buffer:
        """An uninitialised buffer from the workspace pool of the thread, kept over all steps of its part of the loop.

        It calls the pool itself: TVM moves other allocations that stand before the loop to where threads would have
        them in common.
        """
        kind = DataType(dtype)
        size_of = T.uint64(size * kind.bits // 8)
        asked = (CPU, 0, size_of, int(kind.type_code), kind.bits)
        pointer = T.bind(tirx.call_intrin(PointerType(PrimType(dtype)), "tirx.TVMBackendAllocWorkspace", *asked))
        with T.If(T.isnullptr(pointer)), T.Then():
            T.evaluate(T.tvm_throw_last_error())
        self.workspaces.append(pointer)
        return T.decl_buffer((size,), dtype, data=pointer, align=64)


@contextmanager
def shared(nanoseconds: float) -> Iterator[Shared]:
    """A region of a kernel for all threads: ``with shared(time) as team, team.loop(0, extent) as i: ...``.

    Each gets a part of the range of the loop, in order. Before the loop a region holds workspaces only; what is
    allocated within the loop each thread has of its own. The steps write disjoint parts of the output, each in
    full, whatever steps other threads take: then no bit depends on how many there are.

    nanoseconds: what one core takes for a sample, about. Where sharing would cost as much, the loop is serial.
    """
    with ExitStack() as stack:
        team = Shared(nanoseconds < WORTH_SHARING)
        if not team.serial:
            stack.enter_context(T.attr(T.int32(0), "pragma_parallel_launch_point", T.int32(1)))
        yield team
        for pointer in reversed(team.workspaces):
            T.evaluate(T.TVMBackendFreeWorkspace(CPU, 0, pointer))


@contextmanager
def shares(batch: Any, extent: int, nanoseconds: float) -> Iterator[tuple[Any, Any, Any]]:
    """(sample, begin, end) of parts of ``range(extent)`` of every sample, which threads share as in `shared`."""
    parts = 1
    if nanoseconds >= WORTH_SHARING:
        parts = extent if extent <= 2 * SHARES else SHARES  # one step each where they are few: no loop
    if parts == 1:
        with T.serial(0, batch) as sample:
            yield sample, 0, extent
        return
    with shared(nanoseconds) as team, team.loop(0, parts) as part:
        begin, end = share(extent, part, parts)
        with T.serial(0, batch) as sample:  # within: LLVM makes less of indices that a division gives
            yield sample, begin, end


def share(extent: Any, part: Any, parts: int) -> tuple[Any, Any]:
    """Where part number `part` of equal ones (to one) of ``range(extent)`` begins and ends."""
    if parts == 1:
        return 0, extent
    return T.bind(tirx.truncdiv(part * extent, parts)), T.bind(tirx.truncdiv((part + 1) * extent, parts))


def unravel(i: Any, *extents: int) -> list[Any]:
    """The indices of step `i` of loops fused into one, `extents` being those of the inner loops."""
    indices: list[Any] = []
    for extent in reversed(extents):
        outer = T.bind(tirx.truncdiv(i, extent)) if extent > 1 else i
        indices.append(T.bind(i - outer * extent) if extent > 1 else 0)
        i = outer
    return [i, *reversed(indices)]


def span(start: Any, lanes: int) -> Any:
    """Index of `lanes` neighbouring elements."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def flat(buffer: Buffer) -> Buffer:
    """The buffer with one dimension."""
    size = buffer.shape[0]
    for extent in buffer.shape[1:]:
        size = size * extent
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data, scope=buffer.scope())


def store(buffer: Buffer, value: Expr, *indices: Any) -> None:
    """``buffer[indices] = value``."""
    T.buffer_store(buffer, value, list(indices))


def each_vector(extent: int, body: Callable[[Any, int], None], most: int = LANES) -> None:
    """Calls ``body(start, lanes)`` for vectors that cover ``range(extent)``, any extent >= 1.

    Where the lanes do not divide the extent, the last vector ends at the end and overlaps the one before: the
    body must be elementwise and must not read what it writes.
    """
    if vectors(extent, most) == 1:
        body(0, width(extent, most))
    else:
        some_vectors(extent, 0, vectors(extent, most), body, most)


def vectors(extent: int, most: int = LANES) -> int:
    """How many vectors `each_vector` takes."""
    return -(-extent // width(extent, most))


def some_vectors(extent: int, first: Any, end: Any, body: Callable[[Any, int], None], most: int = LANES) -> None:
    """The vectors of `each_vector` from number `first` to `end`."""
    lanes = width(extent, most)
    with T.serial(first, end) as i:
        body(i * lanes if extent % lanes == 0 else T.min(i * lanes, extent - lanes), lanes)


def partial(buffer: Buffer, row: Sequence[Any], start: Any, count: int) -> tuple[Expr, Expr]:
    """The `count` < 16 elements (float32, int32) from `start` on in 16 lanes, then zeros; and the mask of the lanes."""
    index = [tirx.IntImm("int32", lane) for lane in range(LANES)]
    mask = tirx.Shuffle([tirx.IntImm("bool", int(lane < count)) for lane in range(LANES)], index)
    vector = f"{buffer.dtype}x{LANES}"
    value = T.masked_load(vector, buffer, *row, T.ramp(start, 1, LANES), mask)
    zero = vmath.f32(0.0, LANES) if buffer.dtype == "float32" else vmath.i32(0, LANES)
    return tirx.Select(mask, value, zero), mask  # lanes not loaded are undefined


def fold(vector: Expr, combine: Callable[[Expr, Expr], Expr] = lambda a, b: a + b) -> Expr:
    """Sum of the lanes, by halves; or what else combines two."""
    let = vmath.Lets()
    lanes = vmath.lanes(vector)
    while lanes > 1:
        whole, lanes = let(vector, "whole"), lanes // 2
        vector = combine(_lanes_of(whole, 0, lanes), _lanes_of(whole, lanes, lanes))
    return let.close(vector)


def transpose(rows: Sequence[Expr]) -> list[Expr]:
    """Vectors, as many as each has lanes, transposed: lane i of result j is lane j of row i, by rounds of exchanges."""
    rows, step = list(rows), len(rows) // 2
    while step:
        for i in (i for i in range(len(rows)) if not i & step):
            rows[i], rows[i + step] = map(vmath.keep, _exchanged(rows[i], rows[i + step], step))
        step //= 2
    return rows


def folds(rows: Sequence[Expr]) -> Expr:
    """Lane i: the sum of the lanes of vector i, of as many vectors as each has lanes."""
    rows = list(rows)
    while len(rows) > 1:
        step = len(rows) // 2
        pairs = [_exchanged(rows[i], rows[i + step], step) for i in range(step)]
        rows = [vmath.keep(low + high) for low, high in pairs]
    return rows[0]


def _exchanged(a: Expr, b: Expr, step: int) -> tuple[Expr, Expr]:
    """(lanes whose number lacks the bit `step`, those of b in the place of a's others; the rest, likewise)."""
    lanes = vmath.lanes(a)
    low = [lane if not lane & step else lanes + lane - step for lane in range(lanes)]
    high = [lane + step if not lane & step else lanes + lane for lane in range(lanes)]
    first, second = (tirx.Shuffle([a, b], [tirx.IntImm("int32", k) for k in order]) for order in (low, high))
    return first, second


def head(vector: Expr, lanes: int) -> Expr:
    """The first lanes of a vector."""
    return _lanes_of(vector, 0, lanes)


def _lanes_of(vector: Expr, first: int, lanes: int) -> Expr:
    return tirx.Shuffle([vector], [tirx.IntImm("int32", first + i) for i in range(lanes)])


# --------------------------------------------------------------------------------------------------- bodies


def constant(value: float, dtype: str, lanes: int) -> Any:
    """`value` of that type in `lanes` lanes."""
    number = tirx.FloatImm(dtype, value) if dtype.startswith("float") else tirx.IntImm(dtype, int(value))
    return vmath.splat(number, lanes)


def sample_view(buffer: Any, shape: Shape, sample: Any) -> tuple[Any, Any]:
    """A buffer as a flat one, and the index at which `sample` starts in it."""
    inner = math.prod(int(extent) for extent in shape if extent != BATCH)
    batched = shape[:1] == (BATCH,)
    flat = T.decl_buffer((buffer.shape[0] * inner if batched else inner,), buffer.dtype, data=buffer.data)
    return flat, (sample * inner if batched else 0)
