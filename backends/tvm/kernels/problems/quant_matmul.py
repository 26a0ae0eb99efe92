"""Quantized linear layers and convolutions, and the buffers of their kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument, Shape
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, epilogue_arguments

FEW_SEGMENTS = 2
"""Up to so many segments code is written out for each; more are K-groups, and loops over equal ones."""
MANY_ROWS = 16
"""From so many rows a sample on weights may lie as a matrix engine takes them: for `prepare` all more are as many."""
GATED = 32
"""Outputs that lie side by side in a product with a gate, those that they are multiplied by behind them."""
BLOCK = 64
"""On GPUs weights of so many outputs lie together, padded; those of siblings need no padding."""

MOST_INTEGERS = (2**31 - 1) // (255 * 128)
"""Products of codes and 16 times integers of 4 bits whose sum does not overflow."""


@dataclass(frozen=True)
class Gate:
    """One half of the outputs is multiplied by a function of the other (GEGLU, SwiGLU: Shazeer, arXiv 2002.05202).

    op:    the function, a name of `operations.UNARY`
    first: whether it is of the first half
    """

    op: str
    first: bool = False


@dataclass(frozen=True)
class QuantMatmul:
    """``quant_linear`` or ``quant_conv2d`` with everything fixed but the batch.

    height, width:  of the input, channels-last; a linear layer has its rows here
    channels:       C, the input channels
    outputs:        O, the output channels, of all siblings together
    kernel, stride: (vertical, horizontal)
    padding:        (top, bottom, left, right); padded pixels hold the zero point
    bits:           of a stored weight code: 2, 3, 4 or 8
    classes:        number of look-up tables; each 16 output rows choose one (bits < 8)
    segments:       channel counts with scales and zero points of their own; they add up to C
    groups:         G, number of time groups: of the input and of the epilogue's quantizer
    dynamic:        every row of the input has a scale and a zero point of its own; linear layers only
    has_offset:     weights have an offset for each row
    has_bias:       there is a bias
    gate:           what joins the two halves of the outputs, on GPUs alone
    integers:       codes of 4 bits number integers from -8 on, without a gap: GPUs decode them by shifts
    siblings:       epilogues of further products of the same input, whose outputs are behind those of the first, as
                    many of each, and whose results are tensors of their own; on GPUs alone
    epilogue:       what happens to the result before it is stored
    rank:           of the input: 4 for [B,H,W,C], 3 for [B,H,C], 2 for [B,C]
    into:           (elements of a sample, offset of the first row, from one row to the next) of a larger buffer, of
                    which the result is a part
    tile:           (registers, rows) of the micro-kernel, where it is another than `tiles` chooses; the registers are
                    those of `prepare` as well, and 0 rows are as many as fit best
    widths:         for `prepare`: the bits of a stored code by class of row, where rows differ in them; in memory all
                    codes have `bits` and number the entries of the last table, or are values (8)
    code_bytes:     then: of the stored stream
    """

    height: int
    width: int
    channels: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    bits: int = 8
    classes: int = 1
    segments: tuple[int, ...] = ()
    groups: int = 1
    dynamic: bool = False
    has_offset: bool = False
    has_bias: bool = True
    epilogue: Epilogue | None = None
    rank: int = 4
    into: tuple[int, int, int] | None = None
    tile: tuple[int, int] | None = None
    widths: tuple[int, ...] = ()
    code_bytes: int = 0
    gate: Gate | None = None
    integers: bool = False
    siblings: tuple[Epilogue | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.segments:
            object.__setattr__(self, "segments", (self.channels,))
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"weights of {self.bits} bits have no kernel; there are 2, 3, 4 and 8")
        if sum(self.segments) != self.channels or min(self.segments) < 1:
            raise ValueError(f"segments {self.segments} do not partition {self.channels} channels")
        if min(self.out_height, self.out_width, self.channels, self.outputs, self.groups, self.classes) < 1:
            raise ValueError(f"nothing to compute in {self}")
        if self.rank not in (2, 3, 4) or (self.rank < 4 and self.width != 1) or (self.rank < 3 and self.height != 1):
            raise ValueError(f"an input of rank {self.rank} cannot be {self.height} x {self.width}")
        if self.dynamic and not self.pointwise:
            raise ValueError("the rows that a convolution adds up cannot have scales of their own")
        if self.integers and (self.bits != 4 or self.widths):
            raise ValueError(f"codes of {self.widths or self.bits} bits are looked up, those of 4 may be integers")
        if self.integers and self.reduction > MOST_INTEGERS:
            raise ValueError(f"a sum of {self.reduction} products of codes and 16 times integers overflows")
        if self.gate is not None and self.outputs % (2 * GATED):
            raise ValueError(f"{self.outputs} outputs are no pairs of {GATED}, which a gate joins")
        if self.siblings and self.outputs % (self.products * BLOCK):
            raise ValueError(f"{self.outputs} outputs are no {BLOCK} of each of {self.products} products")
        if self.siblings and (self.gate or self.into or not all(map(is_plain, self.epilogues))):
            raise ValueError("products beside one another have epilogues without operands, and no gates")

    @classmethod
    def linear(cls, leading: tuple[int, ...], channels: int, outputs: int, **options: Any) -> QuantMatmul:
        """A linear layer on an input [B, *leading, channels] with at most two leading dimensions."""
        height, width = (*leading, 1, 1)[:2]
        return cls(height, width, channels, outputs, rank=2 + len(leading), **options)

    @property
    def out_height(self) -> int:
        return (self.height + self.padding[0] + self.padding[1] - self.kernel[0]) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.width + self.padding[2] + self.padding[3] - self.kernel[1]) // self.stride[1] + 1

    @property
    def rows(self) -> int:
        """Rows of the matrix product that one sample has."""
        return self.out_height * self.out_width

    @property
    def results(self) -> int:
        """Channels of a result: the outputs of its product, or half of them where a gate joins the halves."""
        return self.outputs // self.products if self.gate is None else self.outputs // 2

    @property
    def products(self) -> int:
        """How many products there are: itself, and its siblings."""
        return 1 + len(self.siblings)

    @property
    def epilogues(self) -> tuple[Epilogue, ...]:
        """Those of all products."""
        return tuple(each or Epilogue() for each in (self.epilogue, *self.siblings))

    @property
    def alone(self) -> QuantMatmul:
        """The first product, without its siblings."""
        return replace(self, outputs=self.outputs // self.products, siblings=())

    @property
    def reduction(self) -> int:
        """K, values in one row of stored codes."""
        return self.kernel[0] * self.kernel[1] * self.channels

    @property
    def segment_runs(self) -> list[tuple[int, int]]:
        """(first, count) of the runs of equal segments that one loop computes."""
        if len(self.segments) <= FEW_SEGMENTS:
            return [(j, 1) for j in range(len(self.segments))]
        runs, first = [], 0
        for _, equal in itertools.groupby(self.segments):
            runs.append((first, len(list(equal))))
            first += runs[-1][1]
        return runs

    @property
    def entries(self) -> int:
        """Entries of a look-up table."""
        return 1 << max(self.widths, default=self.bits)

    @property
    def has_tables(self) -> bool:
        """Whether stored codes number the entries of tables."""
        return self.bits < 8 or bool(self.widths)

    @property
    def pointwise(self) -> bool:
        """Whether row m of the product is pixel m of the input."""
        return self.kernel == self.stride == (1, 1) and not any(self.padding)

    @property
    def late_zeros(self) -> bool:
        """Whether the zero points of dynamic rows count once for all segments, behind their sum."""
        return self.dynamic and len(self.segments) > FEW_SEGMENTS

    @property
    def row_classes(self) -> int:
        """Blocks of 16 output rows that choose a look-up table."""
        return -(-self.outputs // 16)

    def input_shape(self) -> Shape:
        return ("B", *(self.height, self.width)[: self.rank - 2], self.channels)

    def output_shape(self) -> Shape:
        """Shape of the result; the buffer that it is written to has [B, into[0]] where `into` is given."""
        return ("B", *(self.out_height, self.out_width)[: self.rank - 2], self.results)


def is_plain(epilogue: Epilogue) -> bool:
    """Whether an epilogue reads nothing but the value that it is of."""
    return not epilogue.operands and epilogue.bits is None


def of_sibling(name: str, number: int) -> str:
    """The name of an argument of product `number`; those of the first have their usual ones."""
    return f"{name}_{number}" if number else name


def vectors(problem: QuantMatmul, outputs: int, starts: int | None = None) -> list[Argument]:
    """The buffers that `prepare` makes beside codes and tables, for `outputs` channels, padding included.

    starts: rows of start values of a segment, where it is not one for each group of time
    """
    p, n = problem, outputs
    starts = starts or (1 if p.dynamic else p.groups)
    named = [Argument("start", (len(p.segments), starts, n), "int32")]
    named.append(Argument("weight_scale", (len(p.segments), n), "float32"))
    if p.late_zeros:
        named.append(Argument("sums", (n,), "float32"))
    if p.has_offset:
        named.append(Argument("offset", (n,), "float32"))
    if p.has_bias:
        named.append(Argument("bias", (n,), "float32"))
    return named


def stored_arguments(problem: QuantMatmul) -> list[Argument]:
    """The stored form of a layer: packed codes (`formats.packing`), scales, tables, zero points, bias.

    That of siblings is behind it; they share their zero points.
    """
    if problem.siblings:
        own = stored_arguments(problem.alone)
        theirs = [a for a in own if a.name != "act_zero"]
        numbers = range(1, problem.products)
        return own + [replace(a, name=of_sibling(a.name, i)) for i in numbers for a in theirs]
    p, segments = problem, len(problem.segments)
    stored = [
        # as formats.packing.packed_bytes, whose package imports torch
        Argument("codes", (p.code_bytes or -(-p.outputs * p.reduction * p.bits // 8),), "uint8"),
        Argument("scale", (p.outputs, segments), "float16"),
    ]
    if p.has_offset:
        stored.append(Argument("stored_offset", (p.outputs,), "float16"))
    if p.has_tables:
        stored.append(Argument("tables", (len(p.widths) or p.classes, p.entries), "int8"))
        stored.append(Argument("row_class", (-(-p.outputs // 4) if p.widths else p.row_classes,), "uint8"))
    if not p.dynamic:
        stored.append(Argument("act_zero", (segments, p.groups), "uint8"))
    if p.has_bias:
        stored.append(Argument("stored_bias", (p.outputs,), "float16"))
    return stored


def calling(problem: QuantMatmul, weights: Sequence[Argument]) -> list[Argument]:
    """The buffers of a kernel in calling order, the outputs last.

    weights: what `prepare` makes

    ``x`` and ``group``; ``act_scale``, ``act_zero``; the weights; the epilogue's operands, ``qscale`` and ``qzero``
    where it quantizes; ``out``, those of siblings, and ``full``, what the quantizer reads, where the epilogue keeps it.
    Dynamic activations have no ``group``, but their epilogue may.
    """
    tables = (BATCH, problem.rows) if problem.dynamic else (len(problem.segments), problem.groups)
    own = [
        Argument("x", problem.input_shape(), "uint8"),
        *([] if problem.dynamic else [Argument("group", (BATCH,), "int64")]),
        Argument("act_scale", tables, "float32"),
        Argument("act_zero", tables, "uint8"),
        *weights,
    ]
    epilogue, shape = problem.epilogue or Epilogue(), problem.output_shape()
    theirs = epilogue_arguments(epilogue, shape[:-1], problem.results, problem.groups)
    own += [argument for argument in theirs if problem.dynamic or argument.name != "group"]
    kept = [Argument("full", shape)] if epilogue.keeps else []
    written = shape if problem.into is None else (BATCH, problem.into[0])
    results = [Argument(of_sibling("out", i), written, each.out_dtype) for i, each in enumerate(problem.epilogues)]
    return [*own, *results, *kept]


def outputs(problem: QuantMatmul) -> int:
    """How many of the arguments of `calling`, the last ones, are results."""
    kept = problem.epilogue is not None and problem.epilogue.keeps
    return problem.products + kept
