"""Float linear and convolution against torch in float64, packed weights, epilogues, bits across targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm

from mpq_compiler.backends.tvm.build import build
from mpq_compiler.backends.tvm.kernels.cpu import float_gemm
from mpq_compiler.backends.tvm.kernels.problems import float_gemm as problems
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear
from mpq_compiler.ir import ops
from mpq_compiler.ir.interpreter import run
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.targets import table as targets
from mpq_compiler.targets.numerics import BF16, BOUNDS, features_of
from tests.harness import packed, programs, qemu
from tests.harness.fast_attention import emulated, here
from tests.harness.float_kernels import (
    TARGETS,
    Case,
    Suite,
    error,
    quantized,
    quantizer_inputs,
    random_inputs,
    same_bits,
    shape_of,
)

STEPS = Epilogue((Step("silu"), Step("add", operand=0)), (Operand("full"),))
PROBLEMS: dict[str, Linear | Conv2d] = {
    "vector": Linear(1, 96, 384, epilogue=STEPS),
    "vector 33 to 1": Linear(1, 33, 1),
    "vector 5 to 7": Linear(1, 5, 7, bias=False),
    "tokens": Linear(49, 24, 33, epilogue=STEPS),
    "nine rows of one term": Linear(9, 1, 70),
    "many rows": Linear(90, 6, 40),
    "conv_in": Conv2d(9, 11, 1, 48),
    "conv_out": Conv2d(9, 11, 48, 1),
    "conv_out 3": Conv2d(9, 11, 20, 3, epilogue=STEPS),
    "downsample": Conv2d(17, 23, 33, 66, stride=(2, 2), padding=(0, 1, 0, 1)),
    "patches": Conv2d(8, 6, 4, 40, (2, 2), (2, 2), (0, 0, 0, 0), bias=False),
    "smaller than the kernel": Conv2d(2, 1, 5, 6),
    "groups": Conv2d(7, 7, 12, 18, groups=3),
    "depthwise": Conv2d(7, 9, 20, 20, groups=20, epilogue=STEPS),
    "1x3": Conv2d(5, 6, 8, 17, (1, 3), (1, 2), (0, 0, 1, 1)),
}
PACKED = ("vector", "tokens", "downsample", "groups", "depthwise", "conv_out 3")
QUANTIZED = ("tokens", "conv_out 3", "depthwise")
BATCH = 5


def _inputs(name: str) -> list[np.ndarray]:
    return random_inputs(problems.arguments(PROBLEMS[name]), BATCH, len(name))


def _case(problem: Linear | Conv2d, inputs: list[np.ndarray]) -> Case:
    return Case(lambda isa, n: float_gemm.build(problem, isa, n), problems.arguments(problem), inputs, BATCH)


def _exact(name: str) -> np.ndarray:
    problem = PROBLEMS[name]
    named = dict(zip((a.name for a in problems.arguments(problem)), _inputs(name), strict=False))
    t = {key: torch.from_numpy(value).double() for key, value in named.items()}
    if isinstance(problem, Linear):
        y = F.linear(t["x"], t["weight"], t.get("bias"))
    else:
        top, bottom, left, right = problem.padding
        x = F.pad(t["x"].permute(0, 3, 1, 2), (left, right, top, bottom))
        y = F.conv2d(x, t["weight"].permute(0, 3, 1, 2), t.get("bias"), problem.stride, 0, 1, problem.groups)
        y = y.permute(0, 2, 3, 1)
    return (F.silu(y) + t["operand0"] if problem.epilogue.operands else y).numpy()


def _packed(name: str) -> tuple[Linear | Conv2d, list[np.ndarray]]:
    problem, (x, weight, *rest) = replace(PROBLEMS[name], packed=True), _inputs(name)
    return problem, [x, problems.pack_weight(problem, weight), *rest]


def _quantizing(name: str) -> tuple[Linear | Conv2d, list[np.ndarray]]:
    problem = PROBLEMS[name]
    epilogue = replace(problem.epilogue, steps=(*problem.epilogue.steps, Step("quantize", value=8)))
    tables = quantizer_inputs(_exact(name), 2, 8)
    return replace(problem, epilogue=epilogue, time_groups=2), [*_inputs(name), *tables]


SUITE = Suite(
    {name: _case(problem, _inputs(name)) for name, problem in PROBLEMS.items()}
    | {f"{name} packed": _case(*_packed(name)) for name in PACKED}
    | {f"{name} quantized": _case(*_quantizing(name)) for name in QUANTIZED}
)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_same_bits(target: str) -> None:
    SUITE.check_same_bits(target)


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_float64(name: str) -> None:
    assert error(SUITE.first[name], _exact(name)) <= 2e-6


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights(name: str) -> None:
    assert error(SUITE.first[f"{name} packed"], _exact(name)) <= 2e-6


@pytest.mark.parametrize("name", ["tokens", "groups", "depthwise"])
def test_pack_kernel_equals_numpy(name: str) -> None:
    problem, inputs = _packed(name)
    kernel = float_gemm.build_pack(problem, "pack")
    # a kernel without a batch: any target of this machine will do
    module = tvm.compile(tvm.IRModule({"pack": kernel}), target="llvm")
    panel = tvm.runtime.tensor(np.empty(problems.panel_shape(problem), np.float32))
    module["pack"](tvm.runtime.tensor(_inputs(name)[1]), panel)
    np.testing.assert_array_equal(panel.numpy(), inputs[1])


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantizes_its_own_result(name: str) -> None:
    scale, zero, group = _quantizing(name)[1][-3:]
    assert (SUITE.first[f"{name} quantized"] == quantized(SUITE.first[name], scale, zero, group, 8)).all()


@pytest.mark.parametrize("name", ["tokens", "many rows", "downsample", "1x3"])
def test_pieces_of_panels_and_parts_of_rows_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_gemm, "NEAR", 1 << 9)  # as if the cache held next to nothing
    assert same_bits(Suite({name: SUITE.cases[name]}).first[name], SUITE.first[name])


# ---------------------------------------------------------------------------------------------------- bfloat16

WORDS = ("vector", "vector 33 to 1", "tokens", "many rows", "conv_in", "conv_out", "downsample", "patches", "1x3")
ON_ARM = targets.with_features(targets.TARGETS["aarch64-i8mm"], features_of(BF16, "aarch64"))
AVX512_BF16 = targets.with_features(targets.TARGETS["x86-64-avx512vnni"], features_of(BF16, "x86_64"))


def _bfloat16(names: tuple[str, ...], target: targets.Target = AVX512_BF16) -> dict[str, np.ndarray]:
    """What the kernels compute, with weights that the kernel of `build_pack` has packed."""
    lacking = targets.missing_features(target)
    if lacking and (reason := qemu.missing() if target is ON_ARM else f"this machine lacks {', '.join(lacking)}"):
        pytest.skip(reason)
    chosen = {name: replace(PROBLEMS[name], packed=True, numerics=BF16) for name in names}
    functions = {f"run{i}": float_gemm.build(p, target.isa, f"run{i}") for i, p in enumerate(chosen.values())}
    functions |= {f"pack{i}": float_gemm.build_pack(p, f"pack{i}") for i, p in enumerate(chosen.values())}
    call = (emulated if lacking else here)(functions, dict(target.tvm))
    found = {}
    for i, (name, problem) in enumerate(chosen.items()):
        x, weight, *rest = _inputs(name)
        _, panel = call(f"pack{i}", [weight, np.full(problems.panel_shape(problem), 77, np.int32)])
        np.testing.assert_array_equal(panel, problems.pack_weight(problem, weight))
        y = np.full(shape_of(problems.arguments(problem)[-1], BATCH), np.nan, np.float32)
        found[name] = call(f"run{i}", [x, panel, *rest, y])[-1]
    return found


def _rounded(name: str) -> np.ndarray:
    """`ops.linear` and `ops.conv2d` in bfloat16."""
    problem, names = PROBLEMS[name], [a.name for a in problems.arguments(PROBLEMS[name])]
    t = {key: torch.from_numpy(value) for key, value in zip(names, _inputs(name), strict=False)}
    operands = (t["x"], t["weight"], t.get("bias"))
    if isinstance(problem, Linear):
        y = ops.linear(*operands, numerics=BF16)
    else:
        y = ops.conv2d(*operands, problem.stride, problem.padding, numerics=BF16)
    return (F.silu(y) + t["operand0"] if problem.epilogue.operands else y).numpy()


def test_bfloat16_on_arm() -> None:
    for name, y in _bfloat16(WORDS, ON_ARM).items():
        assert error(y, _rounded(name)) <= 2e-6, name


def test_bfloat16_against_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is rounded is rounded alike, so that the bound is that of float32; pieces and parts change no bit."""
    found = _bfloat16(WORDS)
    for name, y in found.items():
        assert error(y, _rounded(name)) <= 2e-6, name
        assert 1e-4 < error(y, _exact(name)) < 1e-2, name
    monkeypatch.setattr(float_gemm, "NEAR", 1 << 8)
    some = ("tokens", "many rows", "downsample", "patches")
    assert all(same_bits(y, found[name]) for name, y in _bfloat16(some).items())


def test_an_artifact(tmp_path: Path) -> None:
    """Layers in bfloat16 through emission, packing at load and the loader; the artifact asks for the instructions."""
    if lacking := targets.missing_features(AVX512_BF16):
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    program, given = programs.bfloat16_layers()
    built = build(program, targets.TARGETS["x86-64-avx512vnni"], (2,), cache=packed.kernel_cache())
    assert built.features == features_of(BF16, "x86_64")
    path = packed.write(tmp_path / "a.mpq", program, AVX512_BF16, built)
    y = compiled_denoiser.load(path, threads=1).run({"x": given.numpy()})
    assert error(y, run(program, {"x": given}).numpy()) <= BOUNDS[BF16]


@pytest.mark.parametrize("name", ["conv_in", "conv_out"])
def test_nan_reaches_what_sees_it(name: str) -> None:
    inputs = _inputs(name)
    inputs[0][1, 0, 0, 0] = np.nan
    suite = Suite({name: _case(PROBLEMS[name], inputs)})
    seen = np.zeros(shape_of(problems.arguments(PROBLEMS[name])[-1], BATCH), bool)
    seen[1, :2, :2] = True
    assert (np.isnan(suite.first[name]) == seen).all()


def test_problems_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="groups do not divide"):
        Conv2d(5, 5, 7, 8, groups=2)
    with pytest.raises(ValueError, match="does not fit"):
        Conv2d(2, 2, 7, 8, padding=(0, 0, 0, 0))
    with pytest.raises(ValueError, match="bf16: only bf16 has a kernel, with packed weights, of one group"):
        Conv2d(5, 5, 8, 8, groups=2, packed=True, numerics=BF16)
