"""Attention against torch in float64, masks, NaN, epilogues, and the same bits on all targets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpq_compiler.backends.tvm.kernels.cpu import attention
from mpq_compiler.backends.tvm.kernels.problems import attention as problems
from mpq_compiler.backends.tvm.kernels.problems.attention import Attention
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from tests.harness.float_kernels import (
    TARGETS,
    Case,
    Suite,
    error,
    quantized,
    quantizer_inputs,
    random_inputs,
    same_bits,
)

RESIDUAL = Epilogue((Step("add", operand=0), Step("silu")), (Operand("full"),))
PROBLEMS = {
    "49 tokens, D 24": Attention(49, 49, 4, 24),
    "cross, D 40": Attention(70, 77, 2, 40, epilogue=RESIDUAL),
    "more than two key blocks, D 33": Attention(50, 131, 3, 33, scale=0.3),
    "one key": Attention(3, 1, 2, 5),
    "few tokens, D 11": Attention(7, 3, 2, 11),
    "full mask": Attention(20, 70, 3, 9, mask=("B", 3, 20, 70)),
    "key mask": Attention(17, 70, 2, 16, mask=("B", 1, 1, 70)),
    "shared mask": Attention(5, 66, 2, 7, mask=(1, 2, 5, 66)),
}
BATCH = 2
NO_KEY = (-1e30, float(np.finfo(np.float32).min), -np.inf)
"""What masks hold for a key that is not there."""


def _case(problem: Attention, inputs: list[np.ndarray]) -> Case:
    return Case(lambda isa, n: attention.build(problem, isa, n), problems.arguments(problem), inputs, BATCH)


def _inputs(name: str, sharpness: float = 2.0) -> list[np.ndarray]:
    inputs = random_inputs(problems.arguments(PROBLEMS[name]), BATCH, len(name))
    inputs[0] *= sharpness
    if PROBLEMS[name].mask is not None:
        inputs[3] = np.where(np.random.default_rng(1).random(inputs[3].shape) < 0.3, -np.inf, inputs[3]).astype(
            np.float32
        )
        inputs[3][..., 0] = 0.5  # at least one key for everyone
    return inputs


def _exact(problem: Attention, inputs: list[np.ndarray]) -> np.ndarray:
    q, k, v = (
        torch.from_numpy(t).double().reshape(BATCH, -1, problem.heads, problem.dim).transpose(1, 2) for t in inputs[:3]
    )
    mask = torch.from_numpy(inputs[3]).double() if problem.mask is not None else None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=problem.scale)
    y = y.transpose(1, 2).reshape(BATCH, problem.queries, problem.channels)
    if problem.epilogue.operands:
        y = F.silu(y + torch.from_numpy(inputs[-1]).double())
    return y.numpy()


QUANTIZED = "cross, D 40"


def _quantizing() -> tuple[Attention, list[np.ndarray]]:
    problem, inputs = PROBLEMS[QUANTIZED], _inputs(QUANTIZED)
    epilogue = replace(RESIDUAL, steps=(*RESIDUAL.steps, Step("quantize", value=6)))
    return replace(problem, epilogue=epilogue, time_groups=2), [
        *inputs,
        *quantizer_inputs(_exact(problem, inputs), 2, 6),
    ]


def _spoiled(which: int) -> list[np.ndarray]:
    """NaN in element 0 of query 5 (which = 0) or of key 5 (1) of sample 0, head 0."""
    inputs = _inputs("49 tokens, D 24")
    inputs[which][0, 5, 0] = np.array([0x7FC00123], np.uint32).view(np.float32)[0]  # a NaN with a payload
    return inputs


def _without_a_key(lowest: float) -> list[np.ndarray]:
    """The first sample sees no key."""
    inputs = _inputs("key mask")
    inputs[3][0] = lowest
    return inputs


SUITE = Suite(
    {name: _case(problem, _inputs(name)) for name, problem in PROBLEMS.items()}
    | {"quantized": _case(*_quantizing())}
    | {"extreme": _case(PROBLEMS["49 tokens, D 24"], _inputs("49 tokens, D 24", 1000.0))}
    | {f"no key, {x:g}": _case(PROBLEMS["key mask"], _without_a_key(x)) for x in NO_KEY}
    | {f"nan {w}": _case(PROBLEMS["49 tokens, D 24"], _spoiled(w)) for w in (0, 1)}
)


@pytest.mark.parametrize("target", TARGETS[1:])
def test_same_bits(target: str) -> None:
    SUITE.check_same_bits(target)


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_float64(name: str) -> None:
    assert error(SUITE.first[name], _exact(PROBLEMS[name], _inputs(name))) <= 2e-6


def test_extreme_logits() -> None:
    name = "49 tokens, D 24"
    assert error(SUITE.first["extreme"], _exact(PROBLEMS[name], _inputs(name, 1000.0))) <= 2e-4


def test_quantizes_its_own_result() -> None:
    scale, zero, group = _quantizing()[1][-3:]
    assert (SUITE.first["quantized"] == quantized(SUITE.first[QUANTIZED], scale, zero, group, 6)).all()


def test_nan_query_spoils_its_row_and_head_only() -> None:
    y = SUITE.first["nan 0"]
    assert np.isnan(y[0, 5, :24]).all() and np.isnan(y).sum() == 24
    assert same_bits(y[1], SUITE.first["49 tokens, D 24"][1])


def test_nan_key_spoils_its_head_only() -> None:
    y = SUITE.first["nan 1"]
    assert np.isnan(y[0, :, :24]).all() and np.isnan(y).sum() == 49 * 24


def test_a_mask_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not broadcast"):
        Attention(5, 6, 2, 8, mask=("B", 3, 5, 6))


@pytest.mark.parametrize("lowest", NO_KEY)
def test_a_row_without_any_key_is_their_mean(lowest: float) -> None:
    y, v = SUITE.first[f"no key, {lowest:g}"], _inputs("key mask")[2]
    assert error(y[0], np.broadcast_to(v[0].mean(0), y[0].shape)) <= 2e-6
    assert same_bits(y[1], SUITE.first["key mask"][1])
