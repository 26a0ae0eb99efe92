"""What rows of channels are written by: the epilogue, with a rotation of channels before its quantizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import Finish
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, store
from mpq_compiler.backends.tvm.kernels.cuda.threads import barrier, shared, strided
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

    def put(self, value: Expr, sample: Any, row: Any, channel: Any) -> None:
        """Apply the steps behind a rotation to a value and store it."""
        done = self.finish(value, sample, (row,), channel, self.finish.quantizer(sample))
        if self.into is None:
            store(self.buffers["y"], done, sample, row, channel)
        else:
            _, offset, step = self.into
            store(self.buffers["y"], done, sample, row * step + (channel + offset))

    def write(
        self, value: Callable[[Any], Expr], sample: Any, row: Any, channels: int, thread: Any, threads: int
    ) -> None:
        """All channels of a row, by all threads of the block; `value` gives them by number."""
        if not self.block:
            with strided(thread, channels, threads) as c:
                self.put(vmath.keep(value(c)), sample, row, c)
            return
        check_block(channels, self.block)
        together = min(channels, max(1, TOGETHER // self.block) * self.block)
        waiting = shared(together)
        for start in range(0, channels, together):  # a thread writes where it alone has read: no barrier between them
            count = min(together, channels - start)
            self._rotated(value, sample, row, start, count, waiting, thread, threads)

    def _rotated(
        self, value: Callable[[Any], Expr], sample: Any, row: Any, start: int, count: int, waiting: Any, thread: Any,
        threads: int,
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
            self.put(vmath.keep(vmath.mul(waiting[c], vmath.f32(block**-0.5, 1))), sample, row, start + c)


def _is_negative(index: Any) -> Expr:
    """Whether `numerics.rotation_sign` of an index is -1."""
    pairs = T.call_pure_extern("int32", "__popc", index & (index >> 1))
    return tirx.EQ(pairs & 1, 1)
