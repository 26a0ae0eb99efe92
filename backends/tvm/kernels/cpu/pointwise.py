"""One kernel for any graph of pointwise operations with broadcasting, ended or not by quantization.

The emitter hands over a `PointwiseProgram`: input shapes, steps in order, output shape. The kernel loops over
samples and, inside, over the output's dimensions, merged wherever every input is either contiguous or
broadcast over both neighbours; the innermost runs in vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import (
    BATCH,
    Argument,
    Buffers,
    Shape,
    primfunc,
    quantizer,
    quantizer_arguments,
    shares,
    some_vectors,
    span,
    store,
    vectors,
    width,
)


@dataclass(frozen=True)
class Input:
    """Refers to input `index` of the program."""

    index: int


@dataclass(frozen=True)
class Result:
    """Refers to the value of step `index`."""

    index: int


Ref = Input | Result | float | int


@dataclass(frozen=True)
class PointwiseStep:
    """One operation.

    op:     a name of `vmath.UNARY`, `BINARY` or `TERNARY`; ``cast`` (to float32); ``rotate`` (neighbours in the last
            dimension by a quarter turn); or ``quantize``, last only
    args:   what it reads; plain numbers are float32 constants
    value:  for ``quantize`` the number of bits
    """

    op: str
    args: tuple[Ref, ...]
    value: int | None = None


@dataclass(frozen=True)
class Window:
    """An input that is a part of its buffer, or lies in it in another order.

    shape:    of the buffer
    strides:  of the input's dimensions, in elements of a sample; 0 for the batch and where it is broadcast
    offset:   of the first element of a sample
    """

    shape: Shape
    strides: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class PointwiseProgram:
    """y = steps(inputs); the value of the last step is the output.

    inputs:  (shape, dtype) of each; shapes broadcast to `shape` from the right. ``"B"`` is the batch; an
             input without it is the same for every sample. Integers and float16 become float32 when read.
    steps:   in order; a step may read earlier ones
    shape:   of the output, ``"B"`` first where there is a batch
    dtype:   of the output where nothing quantizes; integers are truncated towards zero and must be in range
    windows: where inputs lie in their buffers, None for those that are their whole buffers; () where all are

    Arguments: x0, x1, ..., then qscale, qzero and group where the program ends in ``quantize``, y.
    """

    inputs: tuple[tuple[Shape, str], ...]
    steps: tuple[PointwiseStep, ...]
    shape: Shape
    time_groups: int = 1
    dtype: str = "float32"
    windows: tuple[Window | None, ...] = ()

    def __post_init__(self) -> None:
        rank = len(self.shape)
        if self.windows and len(self.windows) != len(self.inputs):
            raise ValueError(f"{len(self.windows)} windows for {len(self.inputs)} inputs")
        for shape, _ in self.inputs:
            padded = (1,) * (rank - len(shape)) + tuple(shape)
            if len(padded) != rank or any(s not in (1, d) for s, d in zip(padded, self.shape, strict=True)):
                raise ValueError(f"input {shape} does not broadcast to {self.shape}")
        if BATCH in self.shape[1:]:
            raise ValueError(f"the batch must be the first dimension of {self.shape}")
        if self.bits is not None and self.shape[:1] != (BATCH,):
            raise ValueError("a program that quantizes needs a batch: scales are chosen by sample")
        if any(step.op == "rotate" for step in self.steps) and int(self.shape[-1]) % 2:
            raise ValueError(f"the last dimension of {self.shape} is no row of pairs to rotate")
        if any(step.op == "quantize" for step in self.steps[:-1]):
            raise ValueError("quantize must be the last step")

    @property
    def bits(self) -> int | None:
        """Number of bits of the quantizer at the end, if there is one."""
        return self.steps[-1].value if self.steps[-1].op == "quantize" else None

    @property
    def out_dtype(self) -> str:
        """Element type of the output."""
        return self.dtype if self.bits is None else "uint8"

    @property
    def accesses(self) -> list[Window]:
        """Where the inputs and the output lie in their buffers, with a stride for each dimension of the output."""
        rank, windows = len(self.shape), self.windows or (None,) * len(self.inputs)
        found = []
        for (shape, _), window in zip([*self.inputs, (self.shape, "")], [*windows, None], strict=True):
            if window is None:
                found.append(Window(shape, tuple(_strides(shape, rank))))
            else:
                missing = (0,) * (rank - len(window.strides))
                found.append(Window(window.shape, missing + window.strides, window.offset))
        return found


def arguments(program: PointwiseProgram) -> list[Argument]:
    """The kernel's buffers in calling order, output last."""
    return [
        *(
            Argument(f"x{i}", access.shape, dtype)
            for i, (access, (_, dtype)) in enumerate(zip(program.accesses, program.inputs, strict=False))
        ),
        *quantizer_arguments(program.bits, program.time_groups),
        Argument("y", program.shape, program.out_dtype),
    ]


def build(program: PointwiseProgram, isa: str = "avx512vnni", name: str = "pointwise") -> PrimFunc:
    """The kernel. All targets share one form; `isa` is accepted for uniformity."""
    del isa
    return primfunc(name, arguments(program), lambda batch, buffers: _body(program, batch, buffers))


def merge_dimensions(extents: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Merges neighbouring dimensions that every operand steps through evenly.

    extents: of the loop nest, outermost first. strides: for each operand, one stride for each dimension (0
    where it is broadcast). The result describes the same accesses in as few dimensions as possible.
    """
    kept = [d for d, extent in enumerate(extents) if extent != 1]
    if not kept:
        return [1], [[0] for _ in strides]
    sizes = [extents[kept[0]]]
    steps = [[stride[kept[0]]] for stride in strides]
    for d in kept[1:]:
        if all(step[-1] == stride[d] * extents[d] for step, stride in zip(steps, strides, strict=True)):
            sizes[-1] *= extents[d]
            for step, stride in zip(steps, strides, strict=True):
                step[-1] = stride[d]
        else:
            sizes.append(extents[d])
            for step, stride in zip(steps, strides, strict=True):
                step.append(stride[d])
    return sizes, steps


def sample_view(buffer: Any, shape: Shape, sample: Any) -> tuple[Any, Any]:
    """A buffer as a flat one, and the index at which `sample` starts in it."""
    inner = math.prod(int(extent) for extent in shape if extent != BATCH)
    batched = shape[:1] == (BATCH,)
    flat = T.decl_buffer((buffer.shape[0] * inner if batched else inner,), buffer.dtype, data=buffer.data)
    return flat, (sample * inner if batched else 0)


def _strides(shape: Shape, rank: int) -> list[int]:
    """Strides of a contiguous operand within a sample, aligned to `rank` dimensions; 0 where broadcast."""
    inner = [1] * (rank - len(shape)) + [1 if extent == BATCH else int(extent) for extent in shape]
    strides, step = [0] * rank, 1
    for d in reversed(range(rank)):
        strides[d] = step if inner[d] != 1 else 0
        step *= inner[d]
    return strides


def _body(program: PointwiseProgram, batch: Any, buffers: Buffers) -> None:
    inner = [1 if extent == BATCH else int(extent) for extent in program.shape]
    accesses = program.accesses
    sizes, strides = merge_dimensions(inner, [access.strides for access in accesses])

    def part(b: Any, first: Any, end: Any) -> None:
        names = [*(f"x{i}" for i in range(len(program.inputs))), "y"]
        views = [sample_view(buffers[n], access.shape, b) for n, access in zip(names, accesses, strict=True)]
        quant = quantizer(buffers, b) if program.bits is not None else None
        starts = [start + access.offset for (_, start), access in zip(views, accesses, strict=True)]
        nest(views, quant, 0, starts, first, end)

    def nest(views: Any, quant: Any, depth: int, starts: list[Any], first: Any, end: Any) -> None:
        if depth + 1 < len(sizes):
            with T.serial(first, end) as i:
                steps = [stride[depth] for stride in strides]
                moved = [start + i * step for start, step in zip(starts, steps, strict=True)]
                nest(views, quant, depth + 1, moved, 0, extents[depth + 1])
            return

        def vector(position: Any, lanes: int) -> None:
            def load(i: int) -> Expr:
                step, (flat, _) = strides[i][-1], views[i]
                value = flat[_apart(starts[i] + position * step, step, lanes)]
                return vmath.splat(vmath.cast(value, "float32"), lanes)

            value = vmath.cast(evaluate(program, load, quant, lanes), program.out_dtype)
            store(views[-1][0], value, span(starts[-1] + position, lanes))

        if extents[-1] == 1:
            vector(0, width(sizes[-1]))
        else:
            some_vectors(sizes[-1], first, end, vector)

    extents = [*sizes[:-1], vectors(sizes[-1])]  # of the loops, the innermost over vectors
    samples = batch if program.shape[:1] == (BATCH,) else 1
    with shares(samples, extents[0], math.prod(sizes) * (1 + len(program.steps)) / 16) as (b, begin, end):
        part(b, begin, end)


def _apart(start: Any, step: int, lanes: int) -> Any:
    """Index of `lanes` elements that are `step` apart; of one where it is 0."""
    return start if lanes == 1 or not step else T.ramp(start, step, lanes)


def evaluate(program: PointwiseProgram, load: Any, quant: Any, lanes: int, partner: Any = None) -> Expr:
    """The value of the last step in `lanes` lanes; every input and every step is computed once.

    partner: what an input with its sign holds where `rotate` takes it from, for single lanes
    """
    inputs: dict[int, Expr] = {}
    results: list[Expr] = []

    def value_of(ref: Ref) -> Expr:
        if isinstance(ref, Input):
            if ref.index not in inputs:
                inputs[ref.index] = vmath.keep(load(ref.index))
            return inputs[ref.index]
        return results[ref.index] if isinstance(ref, Result) else vmath.f32(float(ref), lanes)

    for step in program.steps:
        args = [value_of(ref) for ref in step.args]
        if step.op == "quantize":
            return vmath.quantize(args[0], vmath.reciprocal(quant[0]), quant[1], int(step.value or 0))
        if step.op == "cast":
            value = args[0]
        elif step.op == "rotate":
            value = partner(step.args[0]) if partner else vmath.rotate_pairs(args[0])
        elif step.op in vmath.UNARY:
            value = vmath.UNARY[step.op](*args)
        elif step.op in vmath.BINARY:
            value = vmath.BINARY[step.op](*args)
        elif step.op in vmath.TERNARY:
            value = vmath.TERNARY[step.op](*args)
        else:
            raise ValueError(f"unknown pointwise operation '{step.op}'")
        results.append(vmath.keep(value))
    return results[-1]
