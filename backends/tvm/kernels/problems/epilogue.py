"""Epilogues: the pointwise steps between a kernel's value and what it stores, ended or not by quantization.

A fused region has one anchor (a convolution, linear, norm, attention, ...) and the pointwise operations behind it.
`Epilogue` describes those.

Calling convention: a kernel with an epilogue takes, after its own arguments and before its output, one buffer
for each operand and then, when the epilogue quantizes, ``qscale f32[G]``, ``qzero i32[G]`` and ``group
i64[B]`` (the last one shared with the kernel's own, where it has one).

Every step rounds by itself, as the reference does when it runs the region operation by operation: ``mul`` and
then ``add`` is not a fused multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, ROUNDED, Argument, Shape
from mpq_compiler.backends.tvm.kernels.problems.operations import BINARY, UNARY

OPERAND_KINDS = ("full", "sample", "channel", "scalar")


@dataclass(frozen=True)
class Step:
    """One pointwise operation on the running value.

    op:       a name of `operations.UNARY`; or of `operations.BINARY` with `operand` or `value` as its right hand side
              (``sub`` is value - operand, ``rsub`` operand - value); or ``quantize``, last only
    operand:  index into `Epilogue.operands`
    value:    a constant; for ``quantize`` the number of bits
    """

    op: str
    operand: int | None = None
    value: float | None = None


@dataclass(frozen=True)
class Operand:
    """A float32 buffer read by a binary step.

    kind: ``full`` [M, N] like the output; ``sample`` [B, N], one row for each sample; ``channel`` [N];
          ``scalar`` [1]
    """

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in OPERAND_KINDS:
            raise ValueError(f"operand kind '{self.kind}' is none of {', '.join(OPERAND_KINDS)}")


@dataclass(frozen=True)
class Epilogue:
    """The steps behind an anchor, in order, and the operands they read.

    keeps:   what the quantizer at the end reads is a result as well (of `gemm` only)
    rounded: the result is stored in bfloat16 (on GPUs alone)
    """

    steps: tuple[Step, ...] = ()
    operands: tuple[Operand, ...] = ()
    keeps: bool = False
    rounded: bool = False

    def __post_init__(self) -> None:
        if self.rounded and self.bits is not None:
            raise ValueError("codes are stored as they are, and not rounded")
        if self.keeps and self.bits is None:
            raise ValueError("without a quantizer at the end there is no second result")
        for i, step in enumerate(self.steps):
            if step.op == "quantize":
                if i + 1 != len(self.steps) or step.value not in range(2, 9):
                    raise ValueError("quantize must be the last step, with 2 to 8 bits in `value`")
            elif step.op in BINARY:
                if (step.operand is None) == (step.value is None):
                    raise ValueError(f"step '{step.op}' needs either an operand or a value")
                if step.operand is not None and not 0 <= step.operand < len(self.operands):
                    raise ValueError(f"step '{step.op}' reads operand {step.operand} of {len(self.operands)}")
            elif step.op not in UNARY:
                raise ValueError(f"unknown epilogue step '{step.op}'")

    @property
    def bits(self) -> int | None:
        """Number of bits of the quantizer at the end, if there is one."""
        if self.steps and self.steps[-1].op == "quantize":
            return int(self.steps[-1].value or 0)
        return None

    @property
    def quantize(self) -> int | None:
        """Bits of the quantizer that ends the epilogue; None where there is none."""
        return self.bits

    @property
    def out_dtype(self) -> str:
        """Element type of the kernel's output."""
        if self.bits is not None:
            return "uint8"
        return ROUNDED if self.rounded else "float32"


def epilogue_arguments(epilogue: Epilogue, rows: Shape, channels: int, time_groups: int) -> list[Argument]:
    """Operands, then the quantizer's tables. The output is [*rows, channels], rows[0] being the batch."""
    shapes: dict[str, Shape] = {
        "full": (*rows, channels),
        "sample": (BATCH, channels),
        "channel": (channels,),
        "scalar": (1,),
    }
    result = [Argument(f"operand{i}", shapes[o.kind]) for i, o in enumerate(epilogue.operands)]
    return result + quantizer_arguments(epilogue.bits, time_groups)


def quantizer_arguments(bits: int | None, time_groups: int) -> list[Argument]:
    """``qscale``, ``qzero`` and ``group`` where something quantizes."""
    if bits is None:
        return []
    return [
        Argument("qscale", (time_groups,)),
        Argument("qzero", (time_groups,), "int32"),
        Argument("group", (BATCH,), "int64"),
    ]
