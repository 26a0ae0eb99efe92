"""The innermost loops on outer products: 32 or 16 rows by 32 or 16 output channels, four values of k a step.

They are a function of their own, in streaming mode, which a kernel calls for each tile of rows (`kernels.cpu.sme`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Index
from mpq_compiler.backends.tvm.kernels.cpu import sme
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import loop
from mpq_compiler.backends.tvm.kernels.cpu.gemm.in_tiles import InTiles
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Runs
from mpq_compiler.backends.tvm.kernels.cpu.gemm.weights import prefetch
from mpq_compiler.backends.tvm.kernels.cpu.isa import TILE_ROWS
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment
from mpq_compiler.targets.streaming import LENGTH


@dataclass
class OuterAccumulation(InTiles):
    """The sums in tiles of SME.

    All that `begin`, `add` and `end` say is done by one call, in `end`. Of the four tiles each holds the sums of 16
    rows and 16 channels.
    """

    functions: sme.Functions

    def __post_init__(self) -> None:
        super().__post_init__()
        self.together = self.s.w.pack if self.s.w.looked_up else 1
        """Steps whose codes are one vector."""

    def begin(self, j: Segment, r: Index, first: tuple[Buffer, Index, int] | None) -> None:
        """Sets the sums of rows r and on of the chunk, in segment j.

        first: where the first values lie, and how many int32 a row's are behind those of the row before; None are zeros
        """
        starts = [T.bind(self._row_start(j, r, half)) for half in range(self.halves)]
        self.left, self.second = starts[0], starts[-1] - starts[0]
        self.first = first

    def add(self, runs: Runs) -> None:
        """Adds all products."""
        self._unpack(runs)
        self.runs = runs

    def end(self, product: Buffer, to: Index) -> None:
        """product[to ..] = the sums, int32 [tile.rows, tile.vectors, lanes]."""
        weights, at = self.weights.place(0, 0)
        ahead, _, apart = self.prefetched
        more = {} if self.first is None else {"first": self.first[:2]}
        if self.together > 1:
            more["table"] = (self.block.b["lut"], 0)
        self.functions.call(
            self._tile,
            {
                "left": (self.rows.units, self.left),
                "right": (weights, at),
                "ahead": (self.block.b["tiles"], ahead),
                "product": (product, to),
                **more,
            },
            {"second": self.second, "apart": apart},
        )

    def _tile(self, b: dict[str, Buffer], n: dict[str, Any]) -> None:
        """The function: first values, products, and the sums in memory."""
        lanes, row = self.isa.lanes, self.tile.vectors * self.isa.lanes
        sme.zero()
        if self.together > 1:
            sme.set_table(b["table"], 0)
        if self.first is not None:
            self._load_first(b["first"], self.first[2])
        loop(self.runs.count, partial(self._run, b, n))
        with T.serial(0, TILE_ROWS) as i:
            for t, (half, v) in enumerate(self._cells()):
                sme.save(t, i, b["product"], (half * TILE_ROWS + i) * row + v * lanes)

    def _load_first(self, first: Buffer, row: int) -> None:
        """Sets tiles to first values: one vector for all rows, or those of each."""
        lanes = self.isa.lanes
        if row == 0:
            for t, (_, v) in enumerate(self._cells()):
                sme.add_to_rows(t, sme.vector(first, v * lanes))
            return
        with T.serial(0, TILE_ROWS) as i:
            for t, (half, v) in enumerate(self._cells()):
                sme.load(t, i, first, (half * TILE_ROWS + i) * row + v * lanes)

    def _run(self, b: dict[str, Buffer], n: dict[str, Any], tap: Index) -> None:
        """One run of steps."""
        _, lines, _ = self.prefetched
        offset, groups = T.bind(self.runs.offset(tap)), self.runs.steps // self.together
        with T.serial(0, groups) as i:
            group = T.bind(tap * groups + i)
            first = T.bind(group * (self.tile.vectors * LENGTH))
            stored = [sme.vector(b["right"], first + v * LENGTH) for v in range(self.tile.vectors)]
            for d in range(self.together):
                for line in range(lines):
                    prefetch(b["ahead"], ((group * self.together + d) * lines + line) * n["apart"])
                at = T.bind(offset + (i * self.together + d) * self.rows.plane_apart)
                left = [sme.vector(b["left"], at + half * n["second"]) for half in range(self.halves)]
                right = [sme.look_up(self.s.p.bits, codes, d) for codes in stored] if self.together > 1 else stored
                for t, (half, v) in enumerate(self._cells()):
                    sme.dot(t, left[half], right[v])
