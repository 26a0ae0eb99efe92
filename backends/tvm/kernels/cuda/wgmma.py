"""Quantized linear layers and convolutions on Hopper's tensor cores, which four warps drive together (`wgmma`).

The same tiles, copies, weights and results as of `gemm`; the roles are swapped. A product has 64 output channels down,
whose weights come from registers, decoded as ever: 16 channels to each warp. The rows of the tile are across and come
from shared memory, where they lie as an operand may: 64 bytes a row, chunks swapped by its number. So no activation
passes through registers, and half of the weights are looked up while the tensor cores multiply by the other half, also
from one step to the next: what a step reads is written to two barriers later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, store
from mpq_compiler.backends.tvm.kernels.cuda.gemm import kernel, model, tiles
from mpq_compiler.backends.tvm.kernels.cuda.gemm.kernel import ONES
from mpq_compiler.backends.tvm.kernels.cuda.gemm.tiles import Tile
from mpq_compiler.backends.tvm.kernels.cuda.threads import barrier, local, part, primfunc
from mpq_compiler.backends.tvm.kernels.cuda.weights import CHANNELS, CHUNK, STEP, UNIT, Fragments
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul

STAGES, BLOCK_COLUMNS = 5, 256
"""Steps in shared memory at once; columns of the blocks of threads that a processor has registers for."""
PERIOD = 8 * STEP
"""Bytes of shared memory after which the pattern of swapped chunks begins anew: 8 rows."""
LAYOUT = PERIOD >> 4 | 2 << 30
"""The upper half of an operand in shared memory (PTX ISA, 9.7.17.5.1.2.2): chunks are swapped in rows of 64 bytes."""
SETTLED = """
__forceinline__ __device__ {type} mpq_settled_{type}({type} x) {{
  asm volatile("" : "+{register}"(x) : : "memory");
  return x;
}}
"""
ADDRESS = (1 << 18) - 1
"""The bits of an address in shared memory that an operand has, in units of 16 bytes."""


def build(problem: QuantMatmul, name: str) -> PrimFunc:
    """Build the kernel of an integer product on wgmma."""

    def body(batch: Any, buffers: Buffers) -> None:
        Kernel(problem, tile(problem), buffers, tiles.most_splits(problem)).emit(batch)

    return primfunc(name, kernel.parameters(problem), body)


def operand(buffer: Buffer, layout: int) -> Expr:
    """Describe shared memory to the tensor cores (PTX ISA, 9.7.17.5.1.2.2).

    layout: all bits but those of the address
    """
    address = T.cast(T.cuda.cvta_generic_to_shared(buffer.ptr_to([0])), "uint64")
    upper, lower = divmod(layout, 1 << 32)  # TVM's numbers have 63 bits
    return T.bind((address & T.uint64(ADDRESS)) >> T.uint64(4) | T.uint64(lower) | T.uint64(upper) << T.uint64(32))


def settled(registers: Buffer) -> None:
    """Keeps a compiler, which knows of no registers that are written later, from reading these before."""
    kind, register = ("float", "f") if registers.dtype == "float32" else ("unsigned", "r")
    code = SETTLED.format(type=kind, register=register)
    for i in range(int(registers.shape[0])):
        read = T.cuda.func_call(
            f"mpq_settled_{kind}", registers[i], source_code=code, return_type=registers.dtype
        )
        store(registers, read, i)


def tile(problem: QuantMatmul) -> Tile:
    """The tile of `model.fastest`: its warps have all rows and 16 channels each.

    Sums of rows' codes, which offsets count, are a thread's each. Of several segments sums in floats take as many
    registers again.
    """
    several, of_rows = len(problem.segments) > 1, problem.groups > 1 or problem.has_offset
    most = 160 if not several else 64 if of_rows else 80
    sizes = [(rows, columns) for rows in range(64, most + 1, 16) for columns in (64, 128)]
    outputs = Fragments(problem).outputs
    fitting = [(rows, columns) for rows, columns in sizes if outputs % columns == 0]
    tiles = [Tile(rows, columns, 1, columns // CHANNELS, STAGES, BLOCK_COLUMNS // columns) for rows, columns in fitting]
    return model.fastest(problem, [t for t in tiles if not problem.has_offset or t.rows <= t.threads])


class Kernel(kernel.Kernel):
    """The integer product on wgmma: weights are decoded in registers, activations lie in shared memory."""

    x_align, asynchronous, together = PERIOD, True, 4
    terms = "k32.s32.s8.u8"
    """The end of the name of the instruction: its values of k, and types."""
    signs: tuple[int, ...] = ()
    """The operands behind that which says whether it adds to its sums."""

    def _allocate(self) -> None:
        super()._allocate()
        t = self.t
        self.instruction = f"wgmma.mma_async.sync.aligned.m64n{t.rows}{self.terms}"
        self.decoded = local(STEP // UNIT * t.column_fragments * 4, "uint32")
        self.own_rows = 1
        if self.p.has_offset:
            self.row_sums = local(1, "uint32")
            # Behind the last step nobody reads weights any more.
            first = self.behind if self.several else t.stages * t.rows * STEP
            self.activations = part(self.x, first, len(self.p.segments) * t.rows, "int32")
        self.operand = operand(self.x, LAYOUT << 32)

    @property
    def _kept(self) -> int:
        """Sums of the activations of each segment, of all rows of the tile."""
        return 4 * len(self.p.segments) * self.t.rows if self.several and self.p.has_offset else 0

    def _fragment(self, j: int) -> Any:
        return self.thread // 128 * (4 * self.t.column_fragments) + self.thread // 32 % 4 + 4 * j

    def _land(self, stages: int) -> None:
        super()._land(stages)
        T.evaluate(T.ptx["fence.proxy.async.shared::cta"]())  # the tensor cores read what these copies have written

    def _unit(self, stage: Any, ks: int) -> None:
        t = self.t
        first = ks * t.column_fragments * 4
        T.evaluate(T.ptx.wgmma.wait_group.sync.aligned(1))  # for those that read these registers, a step ago
        for j in range(t.column_fragments):
            self._decode(stage, ks, j, first)
        at = T.bind(self.operand + T.cast(stage * (t.rows * STEP // 16) + ks * (UNIT // 16), "uint64"))
        T.evaluate(T.ptx.wgmma.fence.sync.aligned())
        for j in range(t.column_fragments):
            sums = [self.sums[j * (t.rows // 2) + r] for r in range(t.rows // 2)]
            # As the instruction wants them: channels of 8, then values of k of 16.
            own = [self.decoded[first + j * 4 + 2 * h + kk] for kk in range(2) for h in range(2)]
            T.evaluate(T.ptx[self.instruction](*sums, *own, at, True, *self.signs))
        T.evaluate(T.ptx.wgmma.commit_group.sync.aligned())
        if self.row_sums is not None:
            self._add_codes(stage, ks)

    def _wait(self) -> None:
        T.evaluate(T.ptx.wgmma.wait_group.sync.aligned(0))
        settled(self.sums)

    def _add_codes(self, stage: Any, ks: int) -> None:
        """Add the codes of the thread's row to its sum; where a tile has half as many rows as threads, two threads do.

        The chunks of a step may come in any order: in this one no bank is met twice.
        """
        row = self._row_of_thread()
        for k in range(UNIT // CHUNK):
            chunk = T.bitwise_xor(ks * (UNIT // CHUNK) + k, row // 2 % 4)
            word = T.bind((stage * (self.t.rows * STEP) + row * STEP + chunk * CHUNK) // 4)
            for e in range(CHUNK // 4):
                added = T.call_pure_extern("uint32", "__dp4a", self.x_words[word + e], T.uint32(ONES), self.row_sums[0])
                store(self.row_sums, added, 0)

    def _row_of_thread(self) -> Any:
        return self.thread % self.t.rows

    def _own_row(self, i: int) -> Any:
        return self.first_row + self._row_of_thread()

    def _row_sum(self, i: int) -> Expr:
        return tirx.reinterpret("int32", self.row_sums[0])

    def _first_of_row(self) -> Any:
        return self.thread < self.t.rows

    def _sum_activations(self, segment: Any) -> None:
        if self.row_sums is None:
            return
        value = self._above_zero(self._row_sum(0), T.min(self._own_row(0), self.total - 1), segment)
        if not self.several:
            barrier()
        with T.If(self._first_of_row()), T.Then():
            # another barrier comes before results are stored
            store(self.activations, value, segment * self.t.rows + self._row_of_thread())

    def _activations(self, at: int, segment: Any) -> Expr:
        return self.activations[
            segment * self.t.rows + (at % (self.t.rows // 2) // 4 * 8 + self.lane % 4 * 2 + at % 2)
        ]

    def _each_output(self, body: Callable[[int, Any, Any], None], fragment: int | None = None) -> None:
        t, lane = self.t, self.lane
        for j in range(t.column_fragments):
            for i in range(t.rows // 8) if fragment is None else (2 * fragment, 2 * fragment + 1):
                for e in range(2):
                    row = T.bind(self.first_row + i * 8 + lane % 4 * 2 + e)
                    for h in range(2):
                        column = T.bind(self.first_column + self._fragment(j) * CHANNELS + h * 8 + lane // 4)
                        body(j * (t.rows // 2) + i * 4 + 2 * h + e, row, column)

    def _staged(self, row: Any, column: Any) -> Any:
        return row * self.t.columns + T.bitwise_xor(column, row // 2 % 4 * 8)
