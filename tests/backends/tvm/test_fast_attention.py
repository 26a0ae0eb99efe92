"""Attention in bfloat16 and in 8 bits against its own meaning, and that against exact attention."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import fx

from mpq_compiler.backends.tvm.build import build
from mpq_compiler.backends.tvm.kernels.cpu import fast_attention
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention
from mpq_compiler.ir import ops
from mpq_compiler.ir.facts import Facts
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import PARAMETERS, InputSpec, Program, Stage, TensorStore
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import numerics
from mpq_compiler.targets import table as targets
from mpq_compiler.targets.numerics import BF16, INT8
from tests.harness import packed, qemu
from tests.harness.fast_attention import BATCH, Call, emulated, functions, here, inputs_of, meaning, result
from tests.harness.float_kernels import error, quantized, quantizer_inputs, same_bits

RESIDUAL = Epilogue((Step("add", operand=0),), (Operand("full"),))
PROBLEMS = {
    "49 tokens, D 24": FastAttention(49, 49, 4, 24),
    "cross, D 40": FastAttention(70, 77, 2, 40, epilogue=RESIDUAL),
    "more than two key blocks, D 33": FastAttention(50, 131, 3, 33, scale=0.3),
    "two key blocks of whole words": FastAttention(9, 132, 2, 16),
    "few tokens, D 11": FastAttention(7, 3, 2, 11),
    "one key": FastAttention(3, 1, 2, 5),
    "mask": FastAttention(20, 70, 3, 9, mask=("B", 3, 20, 70)),
}
KINDS = (BF16, INT8)
ON = [(target.name, kind) for target in targets.TARGETS.values() if not target.is_cuda for kind in target.numerics
      if (target.name, kind) != ("x86-64-avx512", BF16)]  # fmt: skip
"""Every CPU target with every numerics that it has kernels for."""
on_each = pytest.mark.parametrize(("on", "kind"), ON)


def _target(name: str, kind: str) -> targets.Target:
    return targets.with_features(targets.TARGETS[name], numerics.features_of(kind, targets.TARGETS[name].arch))


def _require(on: str, kind: str) -> None:
    """Skips where neither this machine nor an emulator runs the kernels."""
    target = _target(on, kind)
    lacking = targets.missing_features(target)
    reason = qemu.missing(on) if target.arch == "aarch64" else f"this machine lacks {', '.join(lacking)}"
    if lacking and reason:
        pytest.skip(reason)


@functools.cache
def _library(on: str, kind: str) -> Call:
    """All kernels of a target."""
    _require(on, kind)
    target = _target(on, kind)
    kernels = functions([replace(p, numerics=kind) for p in (*PROBLEMS.values(), _quantizing())], target.isa)
    return (emulated if targets.missing_features(target) else here)(kernels, dict(target.tvm))


def _run(index: int, problem: FastAttention, inputs: list[np.ndarray], on: str, kind: str) -> np.ndarray:
    return result(_library(on, kind), index, replace(problem, numerics=kind), inputs)


def _of(name: str, on: str, kind: str, inputs: list[np.ndarray] | None = None) -> np.ndarray:
    return _run([*PROBLEMS].index(name), PROBLEMS[name], inputs or inputs_of(PROBLEMS[name]), on, kind)


@on_each
@pytest.mark.parametrize("name", PROBLEMS)
def test_against_its_meaning(name: str, on: str, kind: str) -> None:
    problem = PROBLEMS[name]
    assert error(_of(name, on, kind), meaning(problem, inputs_of(problem), kind)) <= numerics.BOUNDS[kind]


@pytest.mark.parametrize("on", [name for name, kind in ON if kind == INT8 and name != "aarch64-dotprod"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_eight_bits_are_the_same_on_all_targets(name: str, on: str) -> None:
    """As on one that multiplies signed codes."""
    _require(on, INT8)
    assert same_bits(_of(name, on, INT8), _of(name, "aarch64-dotprod", INT8))


def test_a_target_without_dot_products_has_none() -> None:
    with pytest.raises(UserError, match="no kernel of 'x86-64-avx2' computes attention in int8"):
        fast_attention.build(replace(PROBLEMS["one key"], numerics=INT8), "avx2")


def _quantizing() -> FastAttention:
    epilogue = replace(RESIDUAL, steps=(*RESIDUAL.steps, Step("quantize", value=6)))
    return replace(PROBLEMS["cross, D 40"], epilogue=epilogue, time_groups=2)


@on_each
def test_quantizes_its_own_result(on: str, kind: str) -> None:
    y, inputs = _of("cross, D 40", on, kind), inputs_of(PROBLEMS["cross, D 40"])
    tables = quantizer_inputs(y, 2, 6)
    codes = _run(len(PROBLEMS), _quantizing(), [*inputs, *tables], on, kind)
    assert (codes == quantized(y, *tables, 6)).all()


@on_each
@pytest.mark.parametrize("which", (0, 1, 2))
def test_nan_spoils_what_depends_on_it_only(on: str, kind: str, which: int) -> None:
    """NaN in query, key or value 5, dimension 0, of sample 0 and head 0."""
    name = "49 tokens, D 24"
    inputs = inputs_of(PROBLEMS[name])
    inputs[which][0, 5, 0] = np.nan
    y, spoiled = _of(name, on, kind, inputs), np.zeros((BATCH, 49, 96), bool)
    spoiled[(0, 5, slice(24)) if which == 0 else (0, slice(None), slice(24) if which == 1 else 0)] = True
    assert (np.isnan(y) == spoiled).all()
    assert same_bits(y[~spoiled], _of(name, on, kind)[~spoiled])


@pytest.mark.parametrize("on", [name for name, kind in ON if kind == INT8])
def test_a_common_offset_of_keys_costs_eight_bits_nothing(on: str) -> None:
    """It changes no softmax, and is taken off before keys are rounded."""
    name = "49 tokens, D 24"
    inputs = inputs_of(PROBLEMS[name])
    exact = meaning(PROBLEMS[name], inputs, "f32")
    inputs[1] += 100 * np.sign(inputs[1].mean((0, 1)))
    assert error(_of(name, on, INT8, inputs), exact) < 3e-2


@pytest.mark.parametrize(("kind", "bound"), ((BF16, 1e-2), (INT8, 3e-2)))
def test_meaning_against_exact_attention(kind: str, bound: float) -> None:
    """Relative root mean square, with logits of a standard deviation of 2.25; the keys are many."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (s * torch.randn(1, n, 80, generator=generator) for s, n in ((1.5, 40), (1.5, 2000), (1.0, 2000)))
    exact = ops.attention(q.double(), k.double(), v.double(), 2)
    difference = ops.attention(q, k, v, 2, numerics=kind) - exact
    assert 1e-4 < float(difference.square().mean().sqrt() / exact.square().mean().sqrt()) < bound


def test_eight_bits_by_the_formula() -> None:
    """One query, one block, in NumPy float64 but for the codes: the integer definition, written again."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 1, 8), (1, 5, 8), (1, 5, 8)))
    smooth = k[0] - k[0].mean(0)

    def codes(x: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
        most = np.abs(x).max(axis, keepdims=True)
        return np.rint(x * 127 / most), most / 127

    (qc, qs), (kc, ks), (vc, vs) = codes(q[0], 1), codes(smooth, None), codes(v[0], 0)
    logits = (qc @ kc.T) * qs * ks / np.sqrt(8)
    weights = np.rint(255 * np.exp(logits - logits.max()))
    expected = weights @ vc / weights.sum() * vs
    y = ops.attention(*(torch.from_numpy(x) for x in (q, k, v)), 1, numerics=INT8)
    assert error(y[0].numpy(), expected) < 1e-6


def test_gradients_are_those_of_float32() -> None:
    q, k, v = (torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in range(3))
    gradients = [
        torch.autograd.grad(ops.attention(q, k, v, 2, numerics=kind).sum(), (q, k, v)) for kind in ("f32", INT8)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unknown_numerics() -> None:
    x = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="not 'fp4'"):
        ops.attention(x, x, x, 1, numerics="fp4")


def test_an_artifact(tmp_path, monkeypatch) -> None:
    """It computes what its program means, and is refused where the CPU lacks what its kernels ask for."""
    graph = fx.Graph()
    x, text = graph.placeholder("x"), graph.placeholder("text")
    first = graph.call_function(ops.attention, (x, x, x, 2), {"numerics": INT8})
    graph.output(graph.call_function(ops.attention, (first, text, text, 2), {"numerics": BF16}))
    inputs = tuple(InputSpec(name, ("B", rows, 48), torch.float32) for name, rows in (("x", 70), ("text", 9)))
    program = Program(graph, TensorStore(), inputs, Stage.PACKED, facts=Facts({PARAMETERS: 1}))
    _require("x86-64-avx512vnni", BF16)
    target = targets.TARGETS["x86-64-avx512vnni"]
    built = build(program, target, (2,), cache=packed.kernel_cache())
    assert built.features == ("avx512_bf16",)
    path = packed.write(tmp_path / "a.mpq", program, targets.with_features(target, built.features), built)
    given = {name: torch.randn(2, rows, 48, generator=torch.Generator().manual_seed(rows)) for name, rows in
             (("x", 70), ("text", 9))}  # fmt: skip
    y = compiled_denoiser.load(path, threads=1).run({name: value.numpy() for name, value in given.items()})
    assert error(y, run(program, given).numpy()) <= numerics.BOUNDS[BF16]
    monkeypatch.setattr(targets, "host_features", lambda: frozenset(target.features))
    with pytest.raises(UserError, match="cannot run 'x86-64-avx512vnni': it lacks avx512_bf16"):
        compiled_denoiser.load(path)


@on_each
def test_a_row_without_any_key_is_their_mean(on: str, kind: str) -> None:
    inputs = inputs_of(PROBLEMS["mask"])
    for lowest in (-1e30, float(np.finfo(np.float32).min)):
        inputs[3][0] = lowest
        y, mean = _of("mask", on, kind, inputs), inputs[2][0].mean(0)
        assert error(y[0], np.broadcast_to(mean, y[0].shape)) <= 3e-2
        assert error(y, meaning(PROBLEMS["mask"], inputs, kind)) <= numerics.BOUNDS[kind]
