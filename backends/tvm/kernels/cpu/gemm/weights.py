"""The weights of a block of output channels: unpacked, kept for the tiles to come, and fetched ahead of their use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, Index, Shared, span, store
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import opaque, quotient
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Schedule

FEW_AHEAD = 8 * 1024
"""Bytes of weights that are prefetched ahead of their use where rows are fewer than a tile's."""


@dataclass(frozen=True)
class Weights:
    """The weights of a tile.

    Register v of step k of them is

    ``decoded(k - d, d, v)`` from the stored codes, where `fresh` is true, and then `keep` stores it for tiles to come;
    ``ready(k, v)`` where it is not; then ``place(k, v)`` is where it begins. first: all are to be stored
    before the first is used.
    by_packs: k - d has to be a multiple of the steps that share bytes.
    """

    fresh: Any
    first: bool
    by_packs: bool
    decoded: Callable[[Any, int, int], Expr]
    ready: Callable[[Any, Any], Expr]
    keep: Callable[[Expr, Any, int], None]
    place: Callable[[Index, Index], tuple[Buffer, Index]]

    def unpack(self, steps: int, vectors: int, pack: int, begin: Index = 0) -> None:
        """Unpacks some steps of the weights, all before the first is used; ``pack`` steps share bytes."""
        together = pack if self.by_packs else 1
        with T.serial(0, steps // together) as n:
            for d, v in itertools.product(range(together), range(vectors)):
                k = begin + n * together
                self.keep(self.decoded(k, d, v), k + d, v)


class Block:
    """A block of output channels, `number` of those of the layer."""

    def __init__(self, schedule: Schedule, buffers: Buffers) -> None:
        self.s, self.p, self.isa, self.w, self.b = schedule, schedule.p, schedule.isa, schedule.w, buffers
        self.number: Any = 0

    def allocate(self, team: Shared) -> None:
        """The working memory of a thread: the panel of unpacked weights."""
        if self.s.unpacks:
            size = (self.s.ring or self.w.steps) * self.s.tile.vectors * self.isa.vector
            self.panel = team.workspace(size, self.isa.weight)

    def channel(self, v: Any, number: Index | None = None) -> Any:
        """The first output channel of register v, of this block or of another."""
        return (self.number if number is None else number) * self.w.block + v * self.isa.lanes

    def weights(self, begin: Any, kept: Any, fresh: Any) -> Weights:
        """The weights from step ``begin`` on, which are in the panel from its step ``kept`` on.

        fresh: they are not, yet; without a panel (None) they never are
        """
        w, isa, vectors, size = self.w, self.isa, self.s.tile.vectors, self.isa.vector
        tables = [self._table(v) for v in range(vectors)] if self.s.unpacks else []
        # Sums leave no registers for unpacking, or tiles read memory.
        first = kept is not None and (isa.unit > 1 or isa.depth > 0)
        by_packs = self.s.aligned and (kept is None or (first and not self.s.slices))

        def decoded(k: Any, d: int, v: int) -> Expr:
            """Register v of step k + d, from the stored codes."""
            pack: Any
            if by_packs:
                pack, d = quotient(begin + k, w.pack) + d // w.pack, d % w.pack
            else:
                step = T.bind(begin + k + d)
                pack, d = (step, 0) if w.pack == 1 else (step >> (w.pack.bit_length() - 1), step & (w.pack - 1))
            base = T.bind(((self.number * w.packs + pack) * vectors + v) * w.pack_bytes)
            table = tables[v]
            codes = self.b["tiles"][span(base, size)] if table is None else self._codes(base, d)
            weights = codes if table is None else isa.look_up(table, codes)
            return weights if isa.weight == "int8" else tirx.Cast(f"{isa.weight}x{size}", weights)

        def kept_at(k: Index, v: Index) -> Index:
            """Where register v of step k is in the panel."""
            return w.register(tirx.truncmod(k, self.s.ring) if self.s.ring else kept + k, v) * size

        def place(k: Index, v: Index) -> tuple[Buffer, Index]:
            """The panel and where register v of step k is in it, or where weights are stored as they are used."""
            if self.s.unpacks:
                return self.panel, kept_at(k, v)
            number = self.number * (w.steps * vectors) + w.register(begin + k, v)
            return self.b["tiles"], number * (size * self.p.bits // 8)

        def ready(k: Any, v: Any) -> Expr:
            """Register v of step k."""
            buffer, at = place(k, v)
            return buffer[span(at, size)]

        def keep(weights: Expr, k: Any, v: int) -> None:
            """Stores register v of step k in the panel."""
            if kept is not None:
                store(self.panel, weights, span(kept_at(k, v), size))

        return Weights(fresh, first, by_packs, decoded, ready, keep, place)

    def ahead(self, begin: Any, steps: int, t: Any) -> tuple[Any, int, Any]:
        """(where tile t of rows finds weights to prefetch in steps [begin, begin + steps), lines, bytes between them).

        So many lines are asked for in each `Isa.load_steps` steps, or in each of tiles.

        All tiles together ask for the weights behind those steps, one tile after another; who comes when all are
        asked for stays at one line. Few rows (t is None) have no time for that much, and ask for what they need soon.
        """
        w, together = self.w, self.isa.tile_steps if self.isa.amx else self.isa.load_steps
        bytes_ = w.pack_bytes * self.s.tile.vectors
        needed = -(-bytes_ * together // (w.pack * 64))
        if t is None:
            return T.bind(quotient(self.number * w.steps + begin, w.pack) * bytes_ + FEW_AHEAD), needed, 64
        lines = -(-needed // self.s.usual_tiles)
        last = -(-needed // lines)
        here = quotient((self.number * w.steps + begin + steps), w.pack) * bytes_
        size = -(-steps // together) * lines * 64
        if self.s.usual_tiles <= last:
            return T.bind(here + T.min(t, last) * size), lines, 64
        asks = T.bind(T.Select(t < last, 1, 0))
        return T.bind(here + asks * t * size), lines, opaque(asks * 64)

    def prefetch(self, at: Index) -> None:
        """Asks for the cache line of the stored weights that begins at a byte; it may lie behind the last.

        The first cache of a CPU with tiles is full of what they are loaded from: the second one holds it.
        """
        prefetch(self.b["tiles"], at, 2 if self.isa.amx else 1)

    def _table(self, v: int) -> Expr | None:
        """The look-up table of register v of the block."""
        size = self.isa.vector
        if self.p.bits == 8:
            return None
        return T.bind(self.b["lut"][span((self.number * self.s.tile.vectors + v) * size, size)])

    def _codes(self, base: Any, d: Any) -> Expr:
        """Codes of step d of a group, one in each byte."""
        bits, size = self.p.bits, self.isa.vector
        words = size // 4

        def field(plane: Any, shift: Any, width: int) -> Expr:
            """`width` bits of each byte of a plane."""
            value = tirx.reinterpret(f"uint32x{words}", self.b["tiles"][span(base + plane * size, size)])
            mask = tirx.const(0x01010101 * ((1 << width) - 1), "uint32")
            return value >> tirx.Broadcast(T.cast(shift, "uint32"), words) & tirx.Broadcast(mask, words)

        if bits == 3:
            high = field(2, d, 1) << tirx.Broadcast(tirx.const(2, "uint32"), words)
            return tirx.reinterpret(f"uint8x{size}", field(d >> 2, (d & 3) * 2, 2) | high)
        return tirx.reinterpret(f"uint8x{size}", field(0, d * bits, bits))


def prefetch(buffer: Buffer, at: Index, level: int = 1) -> None:
    """Asks for the cache line that begins at an element, in the cache of that level."""
    locality = T.int32(4 - level)
    operands = T.address_of(buffer[at]), T.int32(0), locality, T.int32(1)
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", *operands))
