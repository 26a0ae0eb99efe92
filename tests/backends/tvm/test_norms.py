"""Group, layer and RMS normalization against torch in float64, hard statistics, epilogues, and bits across targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm

from mpq_compiler.backends.tvm.kernels.cpu import norms
from mpq_compiler.backends.tvm.kernels.problems import norms as problems
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm, Norm, RmsNorm
from mpq_compiler.ir import ops
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
    tvm_target,
    unavailable,
)

SILU = Epilogue((Step("silu"),))
MODULATE = Epilogue(
    (Step("mul", operand=0), Step("add", operand=1), Step("add", operand=2), Step("mul", operand=3)),
    (Operand("sample"), Operand("channel"), Operand("full"), Operand("scalar")),
)
PROBLEMS: dict[str, Norm] = {
    "gn 14x14x96": GroupNorm(196, 96, 32, epilogue=SILU),
    "gn 17x23x33 groups of 3": GroupNorm(391, 33, 11),
    "gn 5x66 groups of 11": GroupNorm(5, 66, 6, epilogue=MODULATE),
    "gn one pixel": GroupNorm(1, 48, 4, eps=1e-6),
    "gn one group, no affine": GroupNorm(70, 7, 1, affine=False),
    "gn groups of one": GroupNorm(33, 21, 21),
    "ln 64": LayerNorm(3, 64, epilogue=MODULATE),
    "ln 33": LayerNorm(7, 33),
    "ln 1000": LayerNorm(2, 1000, scale=False, shift=False, eps=1e-6, epilogue=SILU),
    "ln 5": LayerNorm(4, 5, shift=False),
    "ln 191": LayerNorm(5, 191, epilogue=SILU),
    "rms 64": RmsNorm(3, 64, epilogue=MODULATE),
    "rms 13": RmsNorm(7, 13, eps=1e-5),
    "rms 1000": RmsNorm(2, 1000, scale=False, epilogue=SILU),
    "rms 191": RmsNorm(5, 191),
    "gn 14x14x96 rotated": GroupNorm(196, 96, 32, epilogue=SILU, block=32),
    "ln 64 rotated": LayerNorm(3, 64, epilogue=MODULATE, block=64),
    "rms 24 rotated": RmsNorm(5, 24, block=8),
}
HARD = {"hard gn": GroupNorm(200, 36, 4), "hard ln": LayerNorm(200, 36), "hard rms": RmsNorm(200, 36)}
QUANTIZED = ("gn 14x14x96", "gn 5x66 groups of 11", "ln 64", "ln 191", "rms 64", "gn 14x14x96 rotated", "ln 64 rotated")
BATCH = 2
GROUPS = 3


def _case(problem: Norm, inputs: list[np.ndarray], batch: int = BATCH) -> Case:
    return Case(lambda isa, n: norms.build(problem, isa, n), problems.arguments(problem), inputs, batch)


def _inputs(name: str) -> list[np.ndarray]:
    inputs = random_inputs(problems.arguments(PROBLEMS[name]), BATCH, len(name))
    inputs[0] = inputs[0] * 3 + 5
    return inputs


def _hard_inputs(problem: Norm) -> list[np.ndarray]:
    """Large means, an outlier in the first row, a constant channel, tiny and huge scales; batch 5."""
    inputs = random_inputs(problems.arguments(problem), 5, 9)
    x = inputs[0]
    x[0] += 1e4
    x[1, 0] += 1e5
    x[2, ..., 3] = 2.0
    x[3] *= 1e-4
    x[4] *= 1e12
    return inputs


def _exact(problem: Norm, inputs: list[np.ndarray], dtype: torch.dtype = torch.float64) -> np.ndarray:
    """The region in torch, operation by operation."""
    named = dict(zip((a.name for a in problems.arguments(problem)), inputs, strict=False))
    tensors = {name: torch.from_numpy(value).to(dtype) for name, value in named.items()}
    gamma, beta = tensors.get("gamma"), tensors.get("beta")
    if isinstance(problem, GroupNorm):
        rows = tensors["x"].transpose(1, 2)
        y = F.group_norm(rows, problem.groups, gamma, beta, problem.eps).transpose(1, 2)
    elif isinstance(problem, RmsNorm):
        y = F.rms_norm(tensors["x"], (problem.channels,), gamma, problem.eps)
    else:
        y = F.layer_norm(tensors["x"], (problem.channels,), gamma, beta, problem.eps)
    if problem.epilogue.steps[:1] == SILU.steps:
        y = F.silu(y)
    if problem.epilogue.operands:
        o = [tensors[f"operand{i}"] for i in range(4)]
        y = (y * o[0][:, None] + o[1] + o[2]) * o[3]
    return (ops.hadamard(y, problem.block) if problem.block else y).numpy()


def _quantizing(name: str) -> tuple[Norm, list[np.ndarray]]:
    problem = PROBLEMS[name]
    epilogue = replace(problem.epilogue, steps=(*problem.epilogue.steps, Step("quantize", value=8)))
    tables = quantizer_inputs(_exact(problem, _inputs(name)), GROUPS, 8)
    return replace(problem, epilogue=epilogue, time_groups=GROUPS), [*_inputs(name), *tables]


def _in_parts(name: str, *parts: int) -> Case:
    """The same problem, of tensors side by side."""
    x, *others = _inputs(name)
    pieces = np.split(x, np.cumsum(parts)[:-1], axis=-1)
    return _case(replace(PROBLEMS[name], parts=parts), [*(np.ascontiguousarray(p) for p in pieces), *others])


def _into(name: str, rows: int) -> Case:
    """The same problem, written to some rows (less than 0: some channels) of a larger buffer; see test_in_place."""
    problem = PROBLEMS[name]
    channels = problem.channels
    row = channels if rows >= 0 else channels + 5
    size = (problem.positions + max(rows, 0) + 1) * row
    return _case(replace(problem, into=(size, rows * channels if rows >= 0 else 3, row)), _inputs(name))


PARTS = {
    "gn 14x14x96 in parts": _in_parts("gn 14x14x96", 64, 32),
    "gn 17x23x33 groups of 3 in parts": _in_parts("gn 17x23x33 groups of 3", 16, 13, 4),
    "gn 14x14x96 rotated in parts": _in_parts("gn 14x14x96 rotated", 64, 32),
}
PLACES = {"ln 33": 2, "ln 64": -1, "rms 64": 0, "rms 13": -1, "rms 24 rotated": -1}
SUITE = Suite(
    {name: _case(problem, _inputs(name)) for name, problem in PROBLEMS.items()}
    | PARTS
    | {f"{name} in place": _into(name, rows) for name, rows in PLACES.items()}
    | {name: _case(problem, _hard_inputs(problem), 5) for name, problem in HARD.items()}
    | {f"{name} quantized": _case(*_quantizing(name)) for name in QUANTIZED}
)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_same_bits(target: str) -> None:
    SUITE.check_same_bits(target)


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_float64(name: str) -> None:
    assert error(SUITE.first[name], _exact(PROBLEMS[name], _inputs(name))) <= 2e-6


@pytest.mark.parametrize("name", PARTS)
def test_tensors_side_by_side_are_read_where_they_lie(name: str) -> None:
    assert same_bits(SUITE.first[name], SUITE.first[name.removesuffix(" in parts")])


@pytest.mark.parametrize(("name", "rows"), PLACES.items())
def test_in_place(name: str, rows: int) -> None:
    """The part is written, and no other byte of the buffer."""
    problem, buffer = PROBLEMS[name], SUITE.first[f"{name} in place"].copy()
    channels = problem.channels
    row = channels if rows >= 0 else channels + 5
    offset = rows * channels if rows >= 0 else 3
    taken = offset + np.arange(problem.positions)[:, None] * row + np.arange(channels)
    part = buffer[:, taken]
    assert same_bits(np.ascontiguousarray(part), SUITE.first[name])
    buffer[:, taken] = np.frombuffer(b"\xa5" * 4, np.float32)
    assert (buffer.view(np.uint8) == 0xA5).all()


@pytest.mark.parametrize("name", HARD)
def test_hard_statistics_no_worse_than_torch(name: str) -> None:
    inputs = _hard_inputs(HARD[name])
    exact = _exact(HARD[name], inputs)
    single = _exact(HARD[name], inputs, torch.float32)
    for sample in range(5):
        ours, theirs = error(SUITE.first[name][sample], exact[sample]), error(single[sample], exact[sample])
        assert ours <= max(1.5 * theirs, 1e-6), (sample, ours, theirs)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantizes_its_own_result(name: str) -> None:
    scale, zero, group = _quantizing(name)[1][-3:]
    expected = quantized(SUITE.first[name], scale, zero, group, 8)
    assert len(np.unique(expected)) > 50
    assert (SUITE.first[f"{name} quantized"] == expected).all()


@pytest.mark.parametrize("name", ["gn 14x14x96", "gn 17x23x33 groups of 3", "ln 33", "ln 64"])
def test_samples_are_independent_and_nan_stays_in_its_own(name: str) -> None:
    problem, inputs = PROBLEMS[name], _inputs(name)
    batched = ("x", "operand0", "operand2")
    names = [a.name for a in problems.arguments(problem)]
    alone = [v[1:] if n in batched else v for n, v in zip(names, inputs, strict=False)]
    spoiled = [v.copy() for v in inputs]
    spoiled[0][0, -1, -1] = np.nan
    suite = Suite({"alone": _case(problem, alone, 1), "nan": _case(problem, spoiled)})
    assert same_bits(suite.first["alone"][0], SUITE.first[name][1])
    assert same_bits(suite.first["nan"][1], SUITE.first[name][1])
    spoiled_rows = suite.first["nan"][0] if isinstance(problem, GroupNorm) else suite.first["nan"][0, -1]
    size = problem.channels // problem.groups if isinstance(problem, GroupNorm) else problem.channels
    assert np.isnan(spoiled_rows[..., -size:]).all()
    clean = np.isnan(suite.first["nan"]).sum()
    assert clean == spoiled_rows[..., -size:].size


@pytest.mark.parametrize("quantizes", [False, True])
def test_codes_of_what_is_normalized(quantizes: bool) -> None:
    """A second result beside the first: two quantizers of one tensor, with time groups of their own."""
    if reason := unavailable(TARGETS[0]):
        pytest.skip(reason)
    plain, inputs = _quantizing("gn 14x14x96") if quantizes else (PROBLEMS["gn 14x14x96"], _inputs("gn 14x14x96"))
    x, *others = inputs
    scale, zero, group = quantizer_inputs(x, GROUPS, 6, 3)
    group = others[-1] if quantizes else group
    problem = replace(plain, parts=(16, 80), raw=6, raw_groups=GROUPS)
    module = tvm.compile(tvm.IRModule({"f": norms.build(problem, TARGETS[0], "f")}), target=tvm_target(TARGETS[0]))
    made = [np.empty(shape_of(a, BATCH), a.dtype) for a in problems.arguments(problem)[-2:]]
    given = [x[..., :16].copy(), x[..., 16:].copy(), *others, scale, zero, *([] if quantizes else [group]), *made]
    tensors = [tvm.runtime.tensor(array) for array in given]
    module["f"](*tensors)
    y, raw = (tensor.numpy() for tensor in tensors[-2:])
    assert same_bits(y, SUITE.outputs(TARGETS[0])["gn 14x14x96 quantized" if quantizes else "gn 14x14x96"])
    assert (raw == quantized(x, scale, zero, group, 6)).all() and len(np.unique(raw)) > 30


def test_blocks_of_rotations_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="16 channels do not divide into blocks of 32, a power of two"):
        norms.build(GroupNorm(10, 96, 32, block=32, parts=(16, 80)), TARGETS[0])


def test_groups_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="33 channels do not divide into 4 groups"):
        GroupNorm(10, 33, 4)
    with pytest.raises(ValueError, match=r"tensors of \(16, 16\) channels are not 33 channels side by side"):
        GroupNorm(10, 33, 3, parts=(16, 16))
