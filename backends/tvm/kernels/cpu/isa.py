"""What the integer kernels need to know of a CPU target: its dot product and its registers.

The kernels are one source for all of these; everything that differs between the targets stands here.

| name              | dot product of one 32-bit lane            | activations   | weights |
|-------------------|-------------------------------------------|---------------|---------|
| x86-64-amx        | tdpbusd, vpdpbusd zmm: 4 x (u8 * s8)      | u8            | s8      |
| x86-64-avx512vnni | vpdpbusd zmm: 4 x (u8 * s8)               | u8            | s8      |
| x86-64-avxvnni    | vpdpbusd ymm: 4 x (u8 * s8)               | u8            | s8      |
| x86-64-avx512     | vpmaddwd, vpaddd zmm: 2 x (s16 * s16)     | u8 in s16     | s16     |
| x86-64-avx2       | vpmaddwd, vpaddd ymm: 2 x (s16 * s16)     | u8 in s16     | s16     |
| aarch64-neon      | smull, smlal, sadalp: 4 x (s8 * s8)       | s8: code - 128 | s8     |
| aarch64-dotprod   | sdot: 4 x (s8 * s8)                       | s8: code - 128 | s8     |
| aarch64-i8mm      | usmmla: 8 x (u8 * s8), two rows at once   | u8            | s8      |
| aarch64-sme2      | usmopa: 4 x (u8 * s8), usmmla             | u8            | s8      |

All of these are exact. vpmaddubsw is not used: it saturates. The sum of two products of smull and smlal fits 16 bits:
codes less 128 are at least -128, and weights at most 127 in magnitude. Where an activation is stored less 128 the start
values of the accumulators make up for it (`prepare`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import FEW_SEGMENTS, MANY_ROWS
from mpq_compiler.support.errors import UserError, nearest
from mpq_compiler.targets.table import TARGETS

AMX, SME = "amx", "sme"
"""What multiplies in tiles: Intel's matrix extensions, and Arm's."""
TILE_ROWS, TILE_BYTES = MANY_ROWS, 64
"""The rows of a tile, and the bytes of each. One of AMX has 64 values of k of a row, or 4 of them of 16 outputs."""


@dataclass(frozen=True)
class Tile:
    """A micro-kernel: `rows` rows of activations by `vectors` registers of output channels.

    cost: time of one unit of work relative to the best tile of the ISA. Tiles with few vectors load more
          activations for each dot product.
    """

    vectors: int
    rows: int
    cost: float = 1.0


@dataclass(frozen=True)
class Isa:
    """One CPU target of the integer kernels.

    instruction:     that computes it, or the first of those
    lanes:           output channels of a register
    kpack:           values of k that one dot product adds up for each of them
    activation:      element type of the gathered activations: uint8, int8 (code xor 0x80) or int16
    weight:          element type of the weights in registers, int8 or int16
    shuffle:         intrinsic that looks up `lanes * kpack` bytes in 16-entry tables (one for each 16 bytes)
    tiles:           micro-kernels that fit the registers, one for each number of vectors
    load_steps:      steps of k whose activations are loaded at once (sdot takes one of four by index)
    unit:            rows whose sums lie together, of which one instruction computes two outputs each (usmmla)
    loss:            of speed with a row less in a micro-kernel
    split:           32-bit lanes of each output channel: they share the values of k, and are added up at the end
    parts:           registers that the sums of `lanes` channels take
    engine:          what the CPU multiplies in tiles by where that pays (`in_tiles`): `AMX`, `SME`, or nothing
    depth:           then, values of k that one product to a tile adds up; 0 where registers multiply
    """

    name: str
    instruction: str
    lanes: int
    kpack: int
    activation: str
    weight: str
    shuffle: str
    tiles: tuple[Tile, ...]
    load_steps: int = 1
    unit: int = 1
    loss: float = 0.01
    split: int = 1
    parts: int = 1
    engine: str = ""
    depth: int = 0

    @property
    def step(self) -> int:
        """Values of k that channels are padded to a multiple of."""
        return self.depth or self.kpack

    @property
    def words(self) -> int:
        """32-bit lanes of the sums of `lanes` channels."""
        return self.lanes * self.split

    @property
    def word_lanes(self) -> int:
        """How many int32 the activations of a step are."""
        return self.kpack * (2 if self.activation == "int16" else 1) // 4

    @property
    def vector(self) -> int:
        """Weights in one register: `lanes` output channels by `kpack` values of k."""
        return self.lanes * self.kpack

    @property
    def pairs(self) -> str:
        """x86's intrinsic that adds up products of neighbouring int16."""
        return "llvm.x86.avx2.pmadd.wd" if self.words == 8 else "llvm.x86.avx512.pmaddw.d.512"

    @property
    def reads_codes(self) -> bool:
        """Whether the dot product takes u8 activation codes as they are, without a copy."""
        return self.activation == "uint8"

    @property
    def unsigned_excess(self) -> int:
        """How much smaller a gathered activation is than its code: 128 where it is signed, else 0."""
        return 128 if self.activation == "int8" else 0

    def target(self) -> dict[str, Any]:
        """The target that the kernels are compiled for, as TVM takes it."""
        return dict(TARGETS[self.name].tvm)

    def tile(self, outputs: int) -> Tile:
        """The micro-kernel for a number of output channels: least padded work, weighted by `Tile.cost`."""

        def work(tile: Tile) -> float:
            block = tile.vectors * self.lanes
            return -(-outputs // block) * block * tile.cost

        return min(self.tiles, key=work)

    def narrowed(self, outputs: int, channels: int) -> Isa:
        """The variant for few outputs: several lanes of a register for each, where that pads channels little.

        smull takes it for any number of outputs: with a whole register for each, it reads activations as they lie in
        memory.
        """
        if self.instruction == "smull" and -channels % 16 <= channels // 4:
            return replace(self, kpack=16, split=4, parts=4, tiles=(Tile(1, 4),), load_steps=1)
        split = 1
        while self.lanes >= 2 * split * max(4, outputs) and -channels % (2 * split * self.kpack) <= channels // 4:
            split *= 2
        if split == 1:
            return self
        lanes, kpack = self.lanes // split, self.kpack * split
        tiles = (Tile(1, 8),)  # more rows than hide the latency would not help: every one needs a load for each product
        return replace(self, lanes=lanes, kpack=kpack, split=self.split * split, tiles=tiles, load_steps=1)

    @property
    def amx(self) -> bool:
        """Whether tiles of AMX multiply."""
        return self.engine == AMX and self.depth > 0

    @property
    def tile_steps(self) -> int:
        """Steps of registers in one of tiles."""
        return self.depth // self.kpack

    def in_tiles(self, rows: int, outputs: int, segments: Sequence[int]) -> Isa:
        """The variant whose tiles multiply, of a problem with so many rows a sample; itself where that does not pay.

        A product to a tile takes as long for one row as for `TILE_ROWS`, and channels are padded to its depth. Tiles of
        SME are read row by row when they are done, which takes as long as K-groups take to multiply.
        """
        if not self.engine or self.split > 1 or rows < TILE_ROWS:
            return self
        if self.engine == AMX:
            padded = any(-channels % TILE_BYTES > channels // 4 for channels in segments)
            return self if padded else replace(self, depth=TILE_BYTES, tiles=_TILES_SQUARE)
        if len(segments) > FEW_SEGMENTS or -outputs % TILE_ROWS > outputs // 2:
            return self
        square = replace(self, instruction="usmopa", lanes=TILE_ROWS, kpack=4, unit=1, tiles=_TILES_SQUARE)
        return replace(square, depth=square.kpack, load_steps=1)

    def grouped(self, channels: int) -> Tile:
        """The tile for K-groups of so many channels.

        Registers hold the sums of a group, those of all groups so far, and what scaling takes where that is most of the
        work.
        """
        most = self.tiles[0]
        if self.depth:  # sums are not in registers
            return most
        return Tile(-(-most.vectors // 2), most.rows // self.unit - (channels < 64) * self.unit)

    def heights(self, tile: Tile, rows: int) -> Sequence[int]:
        """The rows that a micro-kernel of so many registers may have, the most first, for a sample of `rows` rows.

        As many as hide a product's latency at least.
        """
        if self.depth:
            return [height for height in (2 * TILE_ROWS, TILE_ROWS) if height <= rows]
        least = max(1, tile.rows - 2, -(-8 // (tile.vectors * self.parts)))
        return range(tile.rows, min(least, tile.rows) - 1, -self.unit)

    def fitted(self, tile: Tile, rows: int) -> Tile:
        """The micro-kernel with fewer rows where a sample of `rows` rows then has less to compute twice."""
        heights, most = self.heights(tile, rows), self.tiles[0]
        if self.unit > 1 and 2 * self.unit <= rows < tile.rows:  # rather some rows twice than two at a time
            heights = range(rows // self.unit * self.unit, 2 * self.unit - 1, -self.unit)
        few = tile.vectors * tile.rows <= most.vectors * most.rows // 2  # sums, as for K-groups
        loss = 0.03 if few else self.loss

        def work(height: int) -> float:
            return -(-rows // height) * height * (1 + loss * (tile.rows - height))

        return replace(tile, rows=min(heights, key=work))

    def dot(self, acc: Expr, activations: Expr, weights: Expr) -> Expr:
        """Add the dot products of each 32-bit lane to `acc`. Operands are vectors of the gathered types.

        With usmmla acc are the sums of a unit as `joined` makes them, and the activations are `kpack` of each row.
        """
        i32 = f"int32x{self.words}"
        if self.instruction == "vpmaddwd":
            return acc + tirx.call_llvm_pure_intrin(i32, self.pairs, activations, weights)
        if self.instruction == "sdot":
            return tirx.call_llvm_pure_intrin(i32, "llvm.aarch64.neon.sdot", acc, weights, activations)
        if self.instruction == "smull":
            a, b = (tirx.Cast("int16x8", half) for half in _parts(activations, 2))
            pairs = []
            for part in _parts(weights, self.parts):
                u, v = (tirx.Cast("int16x8", half) for half in _parts(part, 2))
                pairs.append(tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", a * u + b * v))
            return acc + _concatenated(pairs)
        if self.instruction == "usmmla":
            name, parts = "llvm.aarch64.neon.usmmla", zip(_parts(acc, 2), _parts(weights, 2), strict=True)
            return _concatenated([tirx.call_llvm_pure_intrin(i32, name, a, activations, w) for a, w in parts])
        # LLVM 22 gave this intrinsic byte vectors; TVM's own schedule still passes int32 ones and fails.
        return tirx.call_llvm_pure_intrin(i32, f"llvm.x86.avx512.vpdpbusd.{32 * self.words}", acc, activations, weights)

    @property
    def dots_words(self) -> bool:
        """Whether it has `dot_words`."""
        return self.instruction in ("vpdpbusd", "sdot", "usmmla")

    def dot_words(self, total: Expr, unsigned: Expr, signed: Expr) -> Expr:
        """Add the products of the four u8 and the four s8 in each int32 of some registers to `total`.

        What is unsigned is as it is `gathered`: `unsigned_excess` less.
        """
        name = {
            "vpdpbusd": f"llvm.x86.avx512.vpdpbusd.{32 * self.words}",
            "sdot": "llvm.aarch64.neon.sdot",
            "usmmla": "llvm.aarch64.neon.usdot",
        }[self.instruction]
        count = vmath.lanes(total) // self.words
        operands = ((total, "int32"), (unsigned, self.activation), (signed, "int8"))
        parts = []
        for part in zip(*(_parts(value, count) for value, _ in operands), strict=True):
            given = [
                tirx.reinterpret(f"{dtype}x{4 * self.words}", value) if dtype != "int32" else value
                for value, (_, dtype) in zip(part, operands, strict=True)
            ]
            parts.append(tirx.call_llvm_pure_intrin(f"int32x{self.words}", name, *given))
        return _concatenated(parts)

    @property
    def scales(self) -> bool:
        """Whether it has `fraction` and `scaled`."""
        return self.lanes == 16  # AVX-512

    def fraction(self, x: Expr) -> Expr:
        """What some float32 are above the whole number below each (VREDUCEPS)."""
        below = tirx.IntImm("int32", 1)
        return _concatenated([_masked("reduce", part, below) for part in _parts(x, vmath.lanes(x) // self.lanes)])

    def scaled(self, value: Expr, x: Expr) -> Expr:
        """Some float32, each times 2 to the power of the whole number below x (VSCALEFPS)."""
        parts = zip(*(_parts(v, vmath.lanes(v) // self.lanes) for v in (value, x)), strict=True)
        return _concatenated([_masked("scalef", *part) for part in parts])

    def square(self, total: Expr, unsigned: Expr, signed: Expr) -> Expr:
        """Add the products of two rows of eight u8 and two of eight s8, in int32x4 each, to `total` (usmmla).

        Its four sums are those of the first unsigned row with both signed ones, then of the second.
        """
        given = (tirx.reinterpret("uint8x16", unsigned), tirx.reinterpret("int8x16", signed))
        return tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.usmmla", total, *given)

    def sums(self, acc: Expr, values: Expr, weights: Expr) -> Expr:
        """Add the products of `vector` values and weights to `acc`, each to some lane of it."""
        if self.instruction != "usmmla":
            return self.dot(acc, values, weights)
        for part in zip(_parts(values, 2), _parts(weights, 2), strict=True):
            acc = tirx.call_llvm_pure_intrin(f"int32x{self.words}", "llvm.aarch64.neon.usdot", acc, *part)
        return acc

    def joined(self, rows: Sequence[Expr]) -> Expr:
        """The sums of the rows of a unit as `dot` takes them: two outputs of the first, two of the second, ..."""
        if self.unit == 1:
            return rows[0]
        return tirx.Shuffle([*rows], [tirx.IntImm("int32", i) for i in (0, 1, 4, 5, 2, 3, 6, 7)])

    def row(self, unit: Expr, number: int) -> Expr:
        """The sums of one row of a unit."""
        if self.unit == 1:
            return unit
        return tirx.Shuffle([unit], [tirx.IntImm("int32", 2 * number + i) for i in (0, 1, 4, 5)])

    def place(self, channel: Any, k: int) -> Any:
        """Where the weight of an output channel and value k of a step lies among those of the register."""
        if self.instruction == "smull" and self.split == 1:  # its two halves are multiplied one after the other
            return k // 2 * 2 * self.lanes + channel * 2 + k % 2
        return channel * self.kpack + k

    def product(self, values: Expr, factor: Expr, most: int) -> Expr:
        """int32 values, at most `most` in magnitude, times one in -255..128. Multiplying 32 bits is slow on x86."""
        if not self.name.startswith("x86") or self.split > 1 or most > 2**15 - 1:
            return values * tirx.Broadcast(factor, self.lanes)
        pair, low = f"int16x{2 * self.lanes}", tirx.Broadcast(factor & 0xFFFF, self.lanes)  # times (factor, 0)
        halves = [tirx.reinterpret(pair, values), tirx.reinterpret(pair, low)]
        return tirx.call_llvm_pure_intrin(f"int32x{self.lanes}", self.pairs, *halves)

    def spread(self, words: Sequence[Expr]) -> Expr:
        """`kpack` neighbouring activations of each row of a unit, given as int32, for every output."""
        if self.unit > 1:
            return tirx.reinterpret(f"{self.activation}x16", _concatenated(words))
        (word,) = words
        if self.parts > 1:
            return tirx.reinterpret("int8x16", word)
        if self.instruction == "smull":
            first, second = (_element(tirx.reinterpret("int16x2", word), i) for i in range(2))
            every = _concatenated([tirx.Broadcast(first, self.lanes), tirx.Broadcast(second, self.lanes)])
        elif self.split == 1:
            every = tirx.Broadcast(word, self.lanes)
        else:
            every = tirx.Shuffle([word] * self.lanes, [tirx.IntImm("int32", i) for i in range(self.words)])
        return tirx.reinterpret(f"{self.activation}x{self.vector}", every)

    def unfolded(self, values: Expr) -> Expr:
        """int32 values of the outputs in the first of the lanes of each, zeros in the others."""
        if self.split == 1:
            return values
        zeros = tirx.Broadcast(tirx.IntImm("int32", 0), self.lanes)
        at = [n // self.split if n % self.split == 0 else self.lanes for n in range(self.words)]
        return tirx.Shuffle([values] + [zeros] * (self.split - 1), [tirx.IntImm("int32", i) for i in at])

    def folded(self, sums: Expr) -> Expr:
        """The sums of the lanes of each output."""
        count = self.words
        while count > self.lanes:
            whole, count = T.bind(sums), count // 2
            even, odd = ([tirx.IntImm("int32", 2 * n + side) for n in range(count)] for side in (0, 1))
            sums = tirx.Shuffle([whole], even) + tirx.Shuffle([whole], odd)
        return sums

    def load_word(self, buffer: Buffer, index: Expr, rows: int = 1) -> Expr:
        """`kpack` neighbouring activations of each of some rows that lie together at `index`, as int32."""
        lanes = self.word_lanes * rows
        words = f"int32x{lanes}" if lanes > 1 else "int32"
        return tirx.reinterpret(words, buffer[tirx.Ramp(index, 1, self.kpack * rows)])

    def gathered(self, codes: Expr, lanes: int) -> Expr:
        """u8 activation codes in the type of the gathered activations."""
        if self.activation == "uint8":
            return codes
        if self.activation == "int16":
            return tirx.Cast("int16" if lanes == 1 else f"int16x{lanes}", codes)
        flip = tirx.IntImm("uint8", 128)
        flipped = codes ^ (flip if lanes == 1 else tirx.Broadcast(flip, lanes))
        return tirx.reinterpret("int8" if lanes == 1 else f"int8x{lanes}", flipped)

    def look_up(self, table: Expr, indices: Expr) -> Expr:
        """table[indices] for `vector` bytes; table int8 (16 entries for each 16 bytes), indices u8 < 16."""
        signed = f"int8x{self.vector}"
        indices = tirx.reinterpret(signed, indices)
        if self.shuffle == _TBL:  # it looks up 16 bytes
            parts = zip(*(_parts(x, self.vector // 16) for x in (table, indices)), strict=True)
            return _concatenated([tirx.call_llvm_pure_intrin("int8x16", self.shuffle, *part) for part in parts])
        return tirx.call_llvm_pure_intrin(signed, self.shuffle, table, indices)


def _masked(name: str, *operands: Expr) -> Expr:
    """An instruction of AVX-512 by LLVM's name, for all lanes, rounding as usual."""
    every, rounding = tirx.IntImm("int16", -1), tirx.IntImm("int32", 4)
    intrinsic = f"llvm.x86.avx512.mask.{name}.ps.512"
    return tirx.call_llvm_pure_intrin("float32x16", intrinsic, *operands, vmath.f32(0.0, 16), every, rounding)


def _element(vector: Expr, index: int) -> Expr:
    return tirx.Shuffle([vector], [tirx.IntImm("int32", index)])


def _parts(vector: Expr, count: int) -> list[Expr]:
    """The vector in so many equal parts."""
    if count == 1:
        return [vector]
    size = vmath.lanes(vector) // count
    lanes = ([tirx.IntImm("int32", at + i) for i in range(size)] for at in range(0, size * count, size))
    return [tirx.Shuffle([vector], part) for part in lanes]


def _concatenated(vectors: Sequence[Expr]) -> Expr:
    if len(vectors) == 1:
        return vectors[0]
    lanes = sum(vmath.lanes(v) for v in vectors)
    return tirx.Shuffle([*vectors], [tirx.IntImm("int32", i) for i in range(lanes)])


# 32 registers hold at most 29 accumulators beside the weights of a step and one activation; 16 hold 12.
_TILES_512 = (Tile(4, 6), Tile(5, 5, 1.02), Tile(3, 8, 1.02), Tile(2, 12, 1.05), Tile(1, 16, 1.3))
_TILES_SQUARE = (Tile(2, 2 * TILE_ROWS), Tile(1, 2 * TILE_ROWS, 1.4))  # four and two tiles of sums
_TILES_256 = (Tile(2, 6), Tile(3, 4, 1.05), Tile(1, 10, 1.25))
# Sums are 24 registers of the first two: it leaves four for a step of all rows and a few for weights.
_TILES_I8MM = (Tile(3, 8), Tile(4, 6, 1.02), Tile(2, 8, 1.05), Tile(1, 8, 1.3))
_TBL = "llvm.aarch64.neon.tbl1"
_PSHUFB_512 = "llvm.x86.avx512.pshuf.b.512"
# The fewer loads beside the products, the better for cores that issue either: three registers by six rows.
_TILES_SDOT = (Tile(3, 6), Tile(4, 5, 1.02), Tile(5, 4, 1.02), Tile(2, 8, 1.05), Tile(1, 8, 1.3))
# Products of 16 bits take registers of their own before they are added up.
_TILES_NEON = (Tile(4, 4), Tile(3, 4, 1.02), Tile(2, 6, 1.05), Tile(1, 8, 1.3))

ISAS: Mapping[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("x86-64-amx", "vpdpbusd", 16, 4, "uint8", "int8", _PSHUFB_512, _TILES_512, engine=AMX),
        Isa("x86-64-avx512vnni", "vpdpbusd", 16, 4, "uint8", "int8", _PSHUFB_512, _TILES_512),
        Isa("x86-64-avxvnni", "vpdpbusd", 8, 4, "uint8", "int8", "llvm.x86.avx2.pshuf.b", _TILES_256),
        Isa("x86-64-avx512", "vpmaddwd", 16, 2, "int16", "int16", "llvm.x86.avx2.pshuf.b", _TILES_512),
        Isa("x86-64-avx2", "vpmaddwd", 8, 2, "int16", "int16", "llvm.x86.ssse3.pshuf.b.128", _TILES_256),
        Isa("aarch64-neon", "smull", 4, 4, "int8", "int8", _TBL, _TILES_NEON, load_steps=4, loss=0.04),
        Isa("aarch64-dotprod", "sdot", 4, 4, "int8", "int8", _TBL, _TILES_SDOT, load_steps=4, loss=0.04),
        Isa("aarch64-i8mm", "usmmla", 4, 8, "uint8", "int8", _TBL, _TILES_I8MM, load_steps=2, loss=0.04, unit=2),
        Isa(
            *("aarch64-sme2", "usmmla", 4, 8, "uint8", "int8", _TBL, _TILES_I8MM),
            load_steps=2,
            loss=0.04,
            unit=2,
            engine=SME,
        ),
    )
}
"""Instruction sets, by the name of the target."""


def of_family(name: str) -> Isa:
    """The ISA of a target, by its name or by that of the family of its instructions (`Target.isa`)."""
    return next(isa for isa in ISAS.values() if name in (isa.name, TARGETS[isa.name].isa))


def isa(name: str) -> Isa:
    """The ISA of the target of that name; UserError where it has no integer kernels."""
    if name not in ISAS:
        raise UserError(f"no integer kernels for the CPU target '{name}': {nearest(name, ISAS)}")
    return ISAS[name]
