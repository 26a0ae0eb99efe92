"""Programs of pointwise operations with broadcasting, ended or not by quantization."""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, ROUNDED, Argument, Shape
from mpq_compiler.backends.tvm.kernels.problems.epilogue import quantizer_arguments


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

    op:     a name of `operations.UNARY`, `BINARY` or `TERNARY`; ``cast`` (to float32); ``rotate`` (neighbours in the
            last dimension by a quarter turn); or ``quantize``, last only
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
    dtype:   of the output where nothing quantizes; integers are truncated towards zero and must be in range; in
             "bfloat16" (on GPUs alone) it is stored as `argument.ROUNDED`
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
        if self.bits is not None:
            return "uint8"
        return ROUNDED if self.dtype == "bfloat16" else self.dtype

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


def _strides(shape: Shape, rank: int) -> list[int]:
    """Strides of a contiguous operand within a sample, aligned to `rank` dimensions; 0 where broadcast."""
    inner = [1] * (rank - len(shape)) + [1 if extent == BATCH else int(extent) for extent in shape]
    strides, step = [0] * rank, 1
    for d in reversed(range(rank)):
        strides[d] = step if inner[d] != 1 else 0
        step *= inner[d]
    return strides
