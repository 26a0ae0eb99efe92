"""What rows of channels are written by: the epilogue, with a rotation of channels before its quantizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import Finish, apply
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, Index, flat, store
from mpq_compiler.backends.tvm.kernels.cuda.threads import barrier, put_values, shared, strided, value_of, values_of
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue
from mpq_compiler.backends.tvm.kernels.problems.hadamard import check_block

TOGETHER = 8192
"""Channels that are rotated at once: 32 KiB of shared memory, of 48."""


class Rows:
    """Writes rows [sample, row, channels] of `y`.

    block: channels of a rotation, 0 for none. A rotated row is written by a block of threads, others by any thread.
    into:  as of `problems.norms.LayerNorm`
    late:  the rotation comes before all steps of the epilogue, not only before its quantizer
    """

    def __init__(
        self, epilogue: Epilogue, buffers: Buffers, block: int, into: tuple[int, int, int] | None, late: bool = False
    ) -> None:
        self.buffers, self.block, self.into = buffers, block, into
        steps = epilogue.steps
        first = len(steps) - (epilogue.bits is not None) if block and not late else 0
        self.before = Finish(replace(epilogue, steps=steps[:first]), buffers)
        self.finish = Finish(replace(epilogue, steps=steps[first:]), buffers)

    def put(self, values: Sequence[Expr], sample: Index, row: Index, channel: Index, rows: int, channels: int) -> None:
        """Apply the steps behind a rotation to neighbouring values, of rows of so many channels, and store them."""
        at: Index = (sample * rows + row) * channels + channel
        quant = self.finish.quantizer(sample)
        flattened = {name: flat(buffer) for name, buffer in self.buffers.items()}
        done = finished(self.finish.epilogue, flattened, values, quant, at, sample * channels + channel, channel)
        if self.into is not None:
            size, offset, step = self.into
            at = sample * size + row * step + (channel + offset)
        put_values(flattened["y"], done, at)

    def together(self, most: int, channels: int) -> int:
        """How many neighbours, of as many at most, `put` may be given: none of their addresses is split."""
        return math.gcd(most, channels, *(self.into or ()))

    def write(
        self,
        value: Callable[[Index], Expr],
        sample: Index,
        row: Index,
        rows: int,
        channels: int,
        thread: Index,
        threads: int,
    ) -> None:
        """All channels of a row, of so many rows of a sample, by all threads; `value` gives them by number."""
        if not self.block:
            with strided(thread, channels, threads) as c:
                self.put([vmath.keep(value(c))], sample, row, c, rows, channels)
            return
        check_block(channels, self.block)
        together = min(channels, max(1, TOGETHER // self.block) * self.block)
        waiting = shared(together)
        for start in range(0, channels, together):  # a thread writes where it alone has read: no barrier between them
            count = min(together, channels - start)
            self._rotated(value, sample, row, start, count, waiting, thread, threads, rows, channels)

    def _rotated(
        self, value: Callable[[Any], Expr], sample: Any, row: Any, start: int, count: int, waiting: Any, thread: Any,
        threads: int, rows: int, channels: int,
    ) -> None:  # fmt: skip
        """``count`` channels behind ``start``, by way of shared memory."""
        block = self.block
        with strided(thread, count, threads) as c:
            before = vmath.keep(self.before(vmath.keep(value(start + c)), sample, (row,), start + c, None))
            store(waiting, tirx.Select(_is_negative(c % block), vmath.neg(before), before), c)
        barrier()
        step = 1
        while step < block:
            with strided(thread, count // 2, threads) as pair:
                low = T.bind(tirx.truncdiv(pair, step) * (2 * step) + tirx.truncmod(pair, step))
                a, b = vmath.keep(waiting[low]), vmath.keep(waiting[low + step])
                store(waiting, a + b, low)
                store(waiting, a - b, low + step)
            barrier()
            step *= 2
        with strided(thread, count, threads) as c:
            value_ = vmath.keep(vmath.mul(waiting[c], vmath.f32(block**-0.5, 1)))
            self.put([value_], sample, row, start + c, rows, channels)


def finished(
    epilogue: Epilogue,
    buffers: Buffers,
    values: Sequence[Expr],
    quant: tuple[Expr, Expr] | None,
    full: Index,
    sample: Index,
    channel: Index,
) -> list[Expr]:
    """Neighbouring values after an epilogue.

    buffers: flat ones
    full, sample, channel: where operands of these kinds have what belongs to the first value
    """
    count = len(values)
    operands: list[list[Expr]] = []
    for i, operand in enumerate(epilogue.operands):
        buffer = buffers[f"operand{i}"]
        if operand.kind == "scalar":
            operands.append([value_of(buffer, 0)] * count)
        else:
            at = {"channel": channel, "sample": sample}.get(operand.kind, full)
            operands.append(values_of(buffer, at, count))

    def of_value(e: int) -> Callable[[int], Expr]:
        return lambda i: operands[i][e]

    return [apply(epilogue, value, of_value(e), quant) for e, value in enumerate(values)]


def _is_negative(index: Any) -> Expr:
    """Whether `numerics.rotation_sign` of an index is -1."""
    pairs = T.call_pure_extern("int32", "__popc", index & (index >> 1))
    return tirx.EQ(pairs & 1, 1)
