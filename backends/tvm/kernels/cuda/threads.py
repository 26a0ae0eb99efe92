"""What CUDA templates share: grids of threads, their memory, sums over a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import template, vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, Index, store
from mpq_compiler.backends.tvm.kernels.cuda import bfloat16, half
from mpq_compiler.backends.tvm.kernels.problems.argument import HALF, ROUNDED, Argument

THREADS = 256
"""Threads of a block in kernels whose threads share nothing."""
WARP = 32
TOGETHER = "tirx.launch_bounds_min_blocks_per_sm"
ALL_LANES = 0xFFFFFFFF


def primfunc(name: str, arguments: Sequence[Argument], body: Callable[[Any, Buffers], None]) -> PrimFunc:
    """A kernel for GPUs, made as `template.primfunc` does; `body` launches grids, one after the other."""
    with vmath.dialect(vmath.CUDA):
        return template.primfunc(name, half.stored(arguments), body, s_tir=False)


@contextmanager
def grid(blocks: Any, threads: int = THREADS, together: int = 1) -> Iterator[tuple[Any, Any]]:
    """Launches a kernel: (number of the block, number of the thread in it).

    together: blocks that a processor must have registers for
    """
    with (
        T.launch_thread(T.env_thread("blockIdx.x"), blocks) as block,
        T.launch_thread(T.env_thread("threadIdx.x"), threads) as thread,
        T.attr(tirx.const(0, "int32"), TOGETHER, together) if together > 1 else nullcontext(),
    ):
        yield block, thread


@contextmanager
def each(count: Any, threads: int = THREADS) -> Iterator[Any]:
    """Launches a kernel with a thread for each of ``range(count)``."""
    with grid((count + (threads - 1)) // threads, threads) as (block, thread):
        i = T.bind(block * threads + thread)
        with T.If(i < count), T.Then():
            yield i


@contextmanager
def strided(begin: Any, count: int, threads: int) -> Iterator[Any]:
    """The steps of ``range(count)`` that fall to a thread: neighbours to neighbours."""
    with T.serial(0, -(-count // threads)) as step:
        i = T.bind(step * threads + begin)
        if count % threads:
            with T.If(i < count), T.Then():
                yield i
        else:
            yield i


def rolled(count: Index) -> Index:
    """The loop ``range(count)``, for a ``with`` statement, of which a compiler may make no copies.

    It else takes registers for several steps at once where their number is known, and fewer blocks are at work.
    """
    return T.serial(0, count, annotations={"disable_unroll": True})


def shared(size: int, dtype: str = "float32", align: int = 64) -> Buffer:
    """Uninitialised memory of a block; align: bytes."""
    return T.alloc_buffer((size,), dtype, align=align, scope="shared")


ROOM = 48 << 10
"""Bytes of shared memory that a block has without asking for more."""


def shared_bytes(size: int, align: int) -> Buffer:
    """Uninitialised bytes of a block, all that it has; those beyond `ROOM` are asked for where it is launched."""
    return T.alloc_buffer((size,), "uint8", align=align, scope="shared" if size <= ROOM else "shared.dyn")


def part(whole: Buffer, first: int, size: int, dtype: str) -> Buffer:
    """A view of so many elements, of 4 bytes each, behind so many bytes."""
    return T.decl_buffer((size,), dtype, data=whole.data, elem_offset=first // 4, scope=whole.scope())


def local(size: int, dtype: str = "float32") -> Buffer:
    """Uninitialised memory of a thread: registers, where every index is a constant once loops are unrolled."""
    return T.alloc_buffer((size,), dtype, align=64, scope="local")


def values_of(buffer: Buffer, at: Index, count: int) -> list[Expr]:
    """Neighbouring values of a buffer, 1, 2 or 4 of them, read at once; `at` is a multiple of their number.

    Those in `HALF` come in float32.
    """
    if count == 1:
        return [vmath.keep(value_of(buffer, at))]
    if buffer.dtype == HALF:
        words = values_of(in_units(buffer, "uint32", 2), T.bind(at // 2), count // 2)
        return [vmath.keep(value) for word in words for value in half.floats(word)]
    vector = T.bind(in_units(buffer, f"{buffer.dtype}x{count}", count)[T.bind(at // count)])
    return [vmath.keep(tirx.Shuffle([vector], [i])) for i in range(count)]


def value_of(buffer: Buffer, *at: Index) -> Expr:
    """A value of a buffer; one in `HALF` comes in float32."""
    return vmath.cast(buffer[at], "float32") if buffer.dtype == HALF else buffer[at]


PAIRED = (ROUNDED, HALF)
"""Types in which float32 are stored in pairs."""


def _pair(dtype: str, low: Expr, high: Expr) -> Expr:
    """Two float32 as one word of such a type."""
    return bfloat16.pair(low, high) if dtype == ROUNDED else half.pair(low, high)


def put_values(buffer: Buffer, values: Sequence[Expr], at: Index) -> None:
    """Stores neighbouring values at once, as `values_of` reads them; float32 go to `ROUNDED` and `HALF` as these."""
    count = len(values)
    if buffer.dtype in PAIRED and count == 1:
        low = _pair(buffer.dtype, values[0], vmath.f32(0.0, 1)) & T.uint32(0xFFFF)
        store(in_units(buffer, "uint16", 1), T.cast(low, "uint16"), at)
    elif buffer.dtype in PAIRED:
        words = [_pair(buffer.dtype, *values[e : e + 2]) for e in range(0, count, 2)]
        put_values(in_units(buffer, "uint32", 2), words, at // 2)
    elif count == 1:
        store(buffer, values[0], at)
    elif buffer.dtype == "uint8":
        word: Any = T.uint32(0)
        for i, value in enumerate(values):
            word = word | T.cast(value, "uint32") << T.uint32(8 * i)
        unit = f"uint{8 * count}"
        store(in_units(buffer, unit, count), T.cast(word, unit), at // count)
    else:
        whole = tirx.Shuffle(list(values), list(range(count)))
        store(in_units(buffer, f"{buffer.dtype}x{count}", count), whole, at // count)


def in_units(buffer: Buffer, dtype: str, count: int) -> Buffer:
    """The buffer, of one dimension, in units of so many values."""
    if (dtype, count) == (buffer.dtype, 1):
        return buffer
    size = tirx.truncdiv(buffer.shape[0] + (count - 1), count)
    return T.decl_buffer((size,), dtype, data=buffer.data, scope=buffer.scope())


def workspace(size: Any, dtype: str = "float32") -> Buffer:
    """Uninitialised memory of the device, for what one grid hands to the next, of a kernel that runs once.

    TVM frees it as soon as another asks for more, and a CUDA graph goes on with its address: what runs in every call
    has arguments for it. Outside of grids.
    """
    return T.alloc_buffer((size,), dtype, align=64, scope="global")


def barrier() -> None:
    """No thread of the block goes on before all have come here, and all see what each has written."""
    T.evaluate(T.cuda.cta_sync())


def combined(
    values: Sequence[Expr], thread: Any, threads: int, combine: Callable[[Expr, Expr], Expr] = lambda a, b: a + b
) -> list[Expr]:
    """Combine values over all threads of a block, in pairs and in a fixed order; every thread gets the results."""
    places = [shared(threads) for _ in values]
    for place, value in zip(places, values, strict=True):
        store(place, value, thread)
    barrier()
    step = threads // 2
    while step:
        with T.If(thread < step), T.Then():
            for place in places:
                store(place, combine(place[thread], place[thread + step]), thread)
        barrier()
        step //= 2
    found = [vmath.keep(place[0]) for place in places]
    barrier()
    return found


def of_warp(value: Expr, combine: Callable[[Expr, Expr], Expr] = lambda a, b: a + b) -> Expr:
    """Combine the values of a warp's lanes, in pairs and in a fixed order; every lane gets the result."""
    distance = 16
    while distance:
        value = vmath.keep(combine(value, of_lane(value, distance)))
        distance //= 2
    return value


def of_lane(value: Expr, distance: int) -> Expr:
    """The value of the lane whose number differs in the bit `distance`."""
    shuffle = getattr(T.cuda, "__shfl_xor_sync")
    return vmath.keep(shuffle(T.uint32(ALL_LANES), value, distance, 32))


def any_lane(there: Expr) -> Expr:
    """Whether something is true in any lane of a warp: all go the same way."""
    return T.call_pure_extern("int32", "__any_sync", T.uint32(ALL_LANES), T.cast(there, "int32")) != 0


def power(extent: int, least: int = 32, most: int = THREADS) -> int:
    """Threads of a block that shares a row of so many elements: a power of two."""
    threads = least
    while threads < extent and threads < most:
        threads *= 2
    return threads
