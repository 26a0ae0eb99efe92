"""What a kernel does with a value before it stores it: pointwise steps, ended or not by quantization.

A fused region has one anchor (a convolution, linear, norm, attention, ...) and the pointwise operations
behind it. `Epilogue` describes those; `apply` builds the TIR expression for one vector of the result.

Calling convention: a kernel with an epilogue takes, after its own arguments and before its output, one buffer
for each operand and then, when the epilogue quantizes, ``qscale f32[G]``, ``qzero i32[G]`` and ``group
i64[B]`` (the last one shared with the kernel's own, where it has one).

Every step rounds by itself, as the reference does when it runs the region operation by operation: ``mul`` and
then ``add`` is not a fused multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.vmath import Expr

OPERAND_KINDS = ("full", "sample", "channel", "scalar")


@dataclass(frozen=True)
class Step:
    """One pointwise operation on the running value.

    op:       a name of `vmath.UNARY`; or of `vmath.BINARY` with `operand` or `value` as its right hand side
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

    keeps: what the quantizer at the end reads is a result as well (of `gemm` only)
    """

    steps: tuple[Step, ...] = ()
    operands: tuple[Operand, ...] = ()
    keeps: bool = False

    def __post_init__(self) -> None:
        if self.keeps and self.bits is None:
            raise ValueError("without a quantizer at the end there is no second result")
        for i, step in enumerate(self.steps):
            if step.op == "quantize":
                if i + 1 != len(self.steps) or step.value not in range(2, 9):
                    raise ValueError("quantize must be the last step, with 2 to 8 bits in `value`")
            elif step.op in vmath.BINARY:
                if (step.operand is None) == (step.value is None):
                    raise ValueError(f"step '{step.op}' needs either an operand or a value")
                if step.operand is not None and not 0 <= step.operand < len(self.operands):
                    raise ValueError(f"step '{step.op}' reads operand {step.operand} of {len(self.operands)}")
            elif step.op not in vmath.UNARY:
                raise ValueError(f"unknown epilogue step '{step.op}'")

    @property
    def bits(self) -> int | None:
        """Number of bits of the quantizer at the end, if there is one."""
        if self.steps and self.steps[-1].op == "quantize":
            return int(self.steps[-1].value or 0)
        return None

    @property
    def quantize(self) -> int | None:
        """The same as `bits`: truthy when the epilogue ends in a quantizer."""
        return self.bits

    @property
    def out_dtype(self) -> str:
        """Element type of the kernel's output."""
        return "float32" if self.bits is None else "uint8"


def apply(
    epilogue: Epilogue,
    value: Expr,
    load: Callable[[int], Expr],
    quant: tuple[Expr, Expr] | None = None,
) -> Expr:
    """The stored value: `value` after all steps.

    value:  float32 expression of L lanes (neighbouring output channels)
    load:   operand index -> float32 expression, of L lanes or scalar (broadcast here)
    quant:  (scale f32 scalar, zero point i32 scalar) of the sample's time group, where the epilogue
            quantizes. Either may also have L lanes. Loop-invariant, so LLVM hoists the reciprocal.
    """
    count = vmath.lanes(value)
    for step in epilogue.steps:
        if step.op == "quantize":
            if quant is None:
                raise ValueError("the epilogue quantizes, but no scale and zero point were given")
            scale, zero_point = quant
            return vmath.quantize(value, vmath.reciprocal(scale), zero_point, int(step.value or 0))
        if step.op in vmath.UNARY:
            value = vmath.UNARY[step.op](value)
        else:
            right = vmath.f32(step.value, count) if step.value is not None else load(step.operand or 0)
            value = vmath.BINARY[step.op](value, vmath.splat(right, count))
    return value
