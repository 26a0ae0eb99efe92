"""Attention in bfloat16 on Hopper's tensor cores, which four warps drive together (`wgmma`).

The tiles, rows and results of `fast_attention`: both kinds of instruction leave scores and outputs in registers alike.
Queries and weights come from registers, keys and values from shared memory, where rows of 64 dimensions of a key lie
together, chunks of 16 bytes swapped by the number of the row: sums go along them for keys, across them for values.
Where nothing is swapped an H200 takes 1.6 times as long. The values of a step are summed while the scores of the next
become weights (Shah et al., "FlashAttention-3", arXiv 2407.08608, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Index, store
from mpq_compiler.backends.tvm.kernels.cuda import fast_attention
from mpq_compiler.backends.tvm.kernels.cuda.fast_attention import GROUP, STAGES, arguments
from mpq_compiler.backends.tvm.kernels.cuda.threads import barrier, local, primfunc, rolled
from mpq_compiler.backends.tvm.kernels.cuda.wgmma import operand, settled
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention
from mpq_compiler.targets.numerics import BF16, PACKED

WARPS = 4
"""Warps that multiply together."""
KEYS = 64
"""Keys of a step."""
FEW = 128
"""Keys that are one step."""
ROW = 32
"""Words of a row of shared memory: 64 dimensions of a key."""
LAYOUT = (8 * ROW // GROUP) << 32 | 1 << 62
"""An operand in shared memory (PTX ISA, 9.7.17.5.1.2): chunks of rows of 128 bytes are swapped, 8 rows in a period."""
MEMORY = 160 << 10
"""Bytes of shared memory that a block of threads may take."""

@dataclass(frozen=True)
class Tile(fast_attention.Tile):
    """How a block of threads shares an attention.

    groups: of four warps
    """

    groups: int = 1

    @property
    def queries(self) -> int:
        return 16 * WARPS * self.groups

    @property
    def key_words(self) -> int:
        return self._blocks(16 * self.steps)

    @property
    def value_words(self) -> int:
        return self._blocks(self.columns)

    def _blocks(self, dimensions: int) -> int:
        """Words of all keys of a step, in blocks of so many of their dimensions."""
        return -(-dimensions // (PACKED[BF16] * ROW)) * self.keys * ROW


def tile(problem: FastAttention) -> Tile | None:
    """What an H200 does fastest of most shapes; None where four warps have no room for it.

    Where a thread holds more than 128 registers anyway, one block of threads takes twice as many keys in a step.
    """
    keys = -(-problem.keys // 16) * 16 if problem.keys <= FEW else KEYS if problem.dim <= 64 else 2 * KEYS
    found = Tile(problem.dim, 1, keys, problem.dim, 1 if problem.queries <= 64 else 2)
    fits = problem.dim % 8 == 0 and found.words * 4 <= MEMORY and found.registers <= fast_attention.REGISTERS
    return found if fits else None


def build(problem: FastAttention, name: str) -> PrimFunc | None:
    """Build the kernel of an attention on wgmma; None where `fast_attention.build` has the better one."""
    if problem.numerics != BF16 or (own := tile(problem)) is None:
        return None
    return primfunc(name, arguments(problem), lambda batch, buffers: _Kernel(problem, own, buffers).emit(batch))


class _Kernel(fast_attention.Kernel):
    t: Tile
    align = 1024
    """Bytes after which the pattern of swapped chunks begins anew, at most."""

    @property
    def threads(self) -> int:
        return 32 * WARPS * self.t.groups

    def _key_place(self, stage: Index, row: Index, word: Index) -> Index:
        return self._place(stage * self.t.key_words, row, word)

    def _value_place(self, stage: Index, row: Index, word: Index) -> Index:
        return self._place(stage * self.t.value_words, row, word)

    def _place(self, first: Index, row: Index, word: Index) -> Index:
        """Where a word of a row is, behind the first of its stage."""
        chunk = T.bitwise_xor(word % ROW // GROUP, row % (ROW // GROUP))
        return first + word // ROW * (self.t.keys * ROW) + row * ROW + chunk * GROUP + word % GROUP

    def _land(self) -> None:
        super()._land()
        T.evaluate(T.ptx["fence.proxy.async.shared::cta"]())  # the tensor cores read what these copies have written

    def _products(self) -> None:
        p, t = self.p, self.t
        steps = -(-p.keys // t.keys)
        self.weights = local(self.key_tiles * 2, "uint32")
        keys, values = operand(self.keys, LAYOUT), operand(self.values, LAYOUT | (t.keys * ROW // GROUP) << 16)

        def load(step: Index) -> None:
            """The values of a step and the keys of the next."""
            self._load_values(step, T.bind(step % STAGES))
            if steps > 1:
                with T.If(step + 1 < steps), T.Then():
                    self._load_keys(step + 1, T.bind((step + 1) % STAGES))
            T.evaluate(T.ptx.cp.async_.commit_group())

        def score(step: Index) -> None:
            T.evaluate(T.ptx.wgmma.fence.sync.aligned())
            stage = T.bind(step % STAGES)
            for k in range(t.steps):
                query = [self.query[4 * k + r] for r in range(4)]
                first = k * 16 // (PACKED[BF16] * ROW) * t.keys * ROW + k * 16 // PACKED[BF16] % ROW
                at = keys + T.cast((stage * t.key_words + first) // GROUP, "uint64")
                self._multiply(self.scores, query, at, k > 0, turned=False)
            T.evaluate(T.ptx.wgmma.commit_group.sync.aligned())

        def sum_values(step: Index) -> None:
            T.evaluate(T.ptx.wgmma.fence.sync.aligned())
            stage = T.bind(step % STAGES)
            for pair in range(self.key_tiles // 2):
                own = [self.weights[4 * pair + r] for r in range(4)]
                first = (stage * t.value_words + 16 * pair * ROW) // GROUP
                self._multiply(self.out, own, values + T.cast(first, "uint64"), True, turned=True)
            T.evaluate(T.ptx.wgmma.commit_group.sync.aligned())

        def weigh(step: Index, pending: int) -> None:
            T.evaluate(T.ptx.wgmma.wait_group.sync.aligned(pending))
            settled(self.scores)
            if p.mask is not None:
                self._add_mask(step)
            self._weigh(step)
            for tile in range(self.key_tiles):
                for row in range(2):
                    store(self.weights, self._weight(row, tile), 2 * tile + row)

        self._load_keys(0, 0)
        T.evaluate(T.ptx.cp.async_.commit_group())
        self._land()
        barrier()
        score(0)
        load(0)
        weigh(0, 0)
        if steps > 1:
            with rolled(steps - 1) as before:
                step = T.bind(before + 1)
                self._land()  # the keys of this step and the values of the one before
                barrier()
                score(step)
                sum_values(before)
                load(step)
                weigh(step, 1)
        self._land()
        barrier()
        sum_values(steps - 1)
        self._before_outputs()

    def _before_outputs(self) -> None:
        """Waits for the sums of the values of the step before."""
        T.evaluate(T.ptx.wgmma.wait_group.sync.aligned(0))
        settled(self.out)

    def _multiply(self, sums: Buffer, rows: list[Index], operand: Index, adds: bool, turned: bool) -> None:
        """turned: what lies together in shared memory belongs to several sums, not to one."""
        count = int(sums.shape[0])
        instruction = f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.bf16.bf16"
        T.evaluate(T.ptx[instruction](*(sums[r] for r in range(count)), *rows, operand, adds, 1, 1, int(turned)))
