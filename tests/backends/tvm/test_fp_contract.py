"""No product is contracted with a later addition, except where a kernel says fma: the rule of `vmath`.

Three proofs: the rule is needed (LLVM does contract bare products), it works (arithmetic on inputs where a
contracted result differs, and the machine code, on all targets), and every kernel keeps it (its TIR has no
float32 product or quotient outside a fence).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm_ffi.structural import structural_walk

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import primfunc, span, store
from mpq_compiler.backends.tvm.kernels.cpu import attention, float_gemm, gemm, hadamard, matmul, norms, pointwise
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS
from mpq_compiler.backends.tvm.kernels.problems import pointwise as problems
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.attention import Attention
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.problems.hadamard import Hadamard
from mpq_compiler.backends.tvm.kernels.problems.matmul import Access, Matmul
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm, RmsNorm
from mpq_compiler.backends.tvm.kernels.problems.pointwise import Input, PointwiseProgram, PointwiseStep, Result
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from mpq_compiler.targets import table as targets
from tests.harness.float_kernels import TARGETS, Case, Suite, tvm_target

FUSED = re.compile(r"\b(vfn?m(add|sub)\w*|fml[as]|fn?m(add|sub))\b")
A, B, C = Input(0), Input(1), Input(2)
SHAPE = ("B", 16)


def _step(op: str, *args: Any) -> PointwiseStep:
    return PointwiseStep(op, args)


# Ways in which a product meets an addition, each with its meaning in NumPy, which rounds every operation.
PROGRAMS: dict[str, tuple[tuple[PointwiseStep, ...], Any]] = {
    "a*b+c": ((_step("mul", A, B), _step("add", Result(0), C)), lambda a, b, c: a * b + c),
    "c+a*b": ((_step("mul", A, B), _step("add", C, Result(0))), lambda a, b, c: c + a * b),
    "a*b-c": ((_step("mul", A, B), _step("sub", Result(0), C)), lambda a, b, c: a * b - c),
    "c-a*b": ((_step("mul", A, B), _step("rsub", Result(0), C)), lambda a, b, c: c - a * b),
    "a*a+c": ((_step("square", A), _step("add", Result(0), C)), lambda a, b, c: a * a + c),
    "-(a*b)+c": (
        (_step("mul", A, B), _step("neg", Result(0)), _step("add", Result(1), C)),
        lambda a, b, c: -(a * b) + c,
    ),
    "relu(a*b)+c": (
        (_step("mul", A, B), _step("relu", Result(0)), _step("add", Result(1), C)),
        lambda a, b, c: np.maximum(a * b, np.float32(0)) + c,
    ),
    "a*b+a*c": (
        (_step("mul", A, B), _step("mul", A, C), _step("add", Result(0), Result(1))),
        lambda a, b, c: a * b + a * c,
    ),
    "a*b*c+a": (
        (_step("mul", A, B), _step("mul", Result(0), C), _step("add", Result(1), A)),
        lambda a, b, c: a * b * c + a,
    ),
    "a/2^20*b+c": (
        (_step("div", A, 2.0**20), _step("mul", Result(0), B), _step("add", Result(1), C)),
        lambda a, b, c: a / np.float32(2**20) * b + c,
    ),
    "a/3+c": ((_step("div", A, 3.0), _step("add", Result(0), C)), lambda a, b, c: a / np.float32(3) + c),
    "a*b+c in one lane": ((_step("mul", A, B), _step("add", Result(0), C)), lambda a, b, c: a * b + c),
}


def _adversarial(name: str, lanes: int) -> list[np.ndarray]:
    """a, b, c with c close to the rounded product, so that the bits which rounding dropped decide the sum."""
    rng = np.random.default_rng(3)
    a, b = (rng.uniform(1, 2, (64 * 16 // lanes, lanes)).astype(np.float32) for _ in range(2))
    c = -(a / np.float32(2**20) * b if "2^20" in name else a * a if "a*a" in name else a * b)
    return [a, b, c]


def _program(name: str) -> PointwiseProgram:
    shape = ("B", 1) if "one lane" in name else SHAPE
    return PointwiseProgram(((shape, "float32"),) * 3, PROGRAMS[name][0], shape)


def _case(name: str) -> Case:
    program = _program(name)
    inputs = _adversarial(name, program.shape[1])
    return Case(
        lambda isa, n: pointwise.build(program, isa, n),
        problems.arguments(program),
        inputs,
        inputs[0].shape[0],
    )


SUITE = Suite({name: _case(name) for name in PROGRAMS})


def _assembly(kernel: tirx.PrimFunc, target: str) -> str:
    return tvm.compile(tvm.IRModule({"kernel": kernel}), target=tvm_target(target)).mod.inspect_source("asm")


def _bare(batch: Any, buffers: Any) -> None:
    from tvm.script.ir_builder import tirx as T

    with T.serial(0, batch) as b:
        x = buffers["x"][b, span(0, 16)]
        store(buffers["y"], x * x + x, b, span(0, 16))


@pytest.mark.parametrize("target", TARGETS)
def test_bare_products_are_contracted(target: str) -> None:
    """Why the rule exists: LLVM fuses what TVM hands it, on every target."""
    kernel = primfunc("kernel", [Argument("x", SHAPE), Argument("y", SHAPE)], _bare)
    assert FUSED.search(_assembly(kernel, target))


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_has_no_fused_operation(target: str) -> None:
    isa = targets.TARGETS[target].isa
    kernels = {f"k{i}": pointwise.build(_program(p), isa, f"k{i}") for i, p in enumerate(PROGRAMS)}
    module = tvm.compile(tvm.IRModule(kernels), target=tvm_target(target))
    assert (found := FUSED.search(module.mod.inspect_source("asm"))) is None, found


def test_inputs_are_adversarial() -> None:
    """On them one fused operation gives another result than two rounded ones."""
    a, b, c = (v.astype(np.float64) for v in _adversarial("a*b+c", 16))
    assert ((a * b + c).astype(np.float32) != PROGRAMS["a*b+c"][1](*_adversarial("a*b+c", 16))).mean() > 0.9


@pytest.mark.parametrize("target", TARGETS[1:])
def test_same_bits(target: str) -> None:
    SUITE.check_same_bits(target)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_operation_rounds(name: str) -> None:
    expected = PROGRAMS[name][1](*SUITE.cases[name].inputs)
    assert expected.dtype == np.float32
    assert (SUITE.first[name].view(np.int32) == expected.view(np.int32)).all()


# ------------------------------------------------------------------------------------- the source of all kernels

LLVM_CALL = tvm.ir.Op.get("tirx.call_llvm_pure_intrin")
FENCE = tvm.target.codegen.llvm_lookup_intrinsic_id("llvm.arithmetic.fence")


def _products(kernel: tirx.PrimFunc) -> tuple[int, list[Any]]:
    """The number of fenced float32 products and quotients of a kernel, and those that are not fenced."""
    fenced: list[Any] = []
    all_products: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, (tirx.Mul, tirx.Div)) and str(node.ty).startswith("float"):
            all_products.append(node)
        elif isinstance(node, tvm.ir.Call) and node.op.same_as(LLVM_CALL) and node.args[0].value == FENCE:
            fenced.append(node.args[1])

    structural_walk(kernel.body, visit)
    bare = [p for p in all_products if not any(p.same_as(f) for f in fenced)]
    return len(fenced), bare


EVERY = Epilogue(
    (
        *(Step(op) for op in sorted(vmath.UNARY)),
        *(Step(op, operand=i % 4) for i, op in enumerate(sorted(vmath.BINARY))),
        *(Step(op, value=0.7) for op in sorted(vmath.BINARY)),
        Step("quantize", value=8),
    ),
    tuple(Operand(kind) for kind in ("full", "sample", "channel", "scalar")),
)
KERNELS = {
    "group_norm": lambda: norms.build(GroupNorm(40, 33, 11, epilogue=EVERY)),
    "layer_norm": lambda: norms.build(LayerNorm(5, 83, epilogue=EVERY)),
    "rms_norm": lambda: norms.build(RmsNorm(5, 83, epilogue=EVERY)),
    "hadamard": lambda: hadamard.build(Hadamard(5, 96, 32, epilogue=EVERY)),
    "matmul": lambda: matmul.build(
        Matmul(
            (3,), 9, 600, 33, Access((600, 3, 9), (9, 1, 27)), Access((600, 3, 33), (33, 99, 1)),
            Access((3, 9, 33), (297, 33, 1)),
        )
    ),
    "attention": lambda: attention.build(Attention(49, 70, 2, 11, epilogue=EVERY)),
    "attention-mask": lambda: attention.build(Attention(9, 7, 2, 8, mask=("B", 1, 9, 7))),
    "linear-dot": lambda: float_gemm.build(Linear(1, 83, 33, epilogue=EVERY)),
    "conv2d-panel": lambda: float_gemm.build(Conv2d(9, 9, 33, 33, epilogue=EVERY)),
    "conv2d-depthwise": lambda: float_gemm.build(Conv2d(9, 9, 33, 33, groups=33, epilogue=EVERY)),
    **{
        f"quant_conv2d {isa}": lambda isa=isa: gemm.build(
            QuantMatmul(9, 9, 33, 33, (3, 3), padding=(1, 1, 1, 1), has_offset=True, epilogue=EVERY),
            ISAS[isa],
            "kernel",
        )
        for isa in ISAS
    },
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_product_is_fenced(name: str) -> None:
    fenced, bare = _products(KERNELS[name]())
    assert not bare, f"float32 products outside vmath.mul, vmath.div and vmath.fma: {bare[:3]}"
    assert fenced or name == "matmul", "the walk over the TIR finds no fence at all"  # it has multiply-adds alone


def test_the_walk_finds_a_bare_product() -> None:
    kernel = primfunc("kernel", [Argument("x", SHAPE), Argument("y", SHAPE)], _bare)
    assert len(_products(kernel)[1]) == 1
