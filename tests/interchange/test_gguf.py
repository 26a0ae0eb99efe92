"""Blocks of GGUF against the decoder of the package gguf."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from mpq_compiler.interchange.gguf import KINDS, encode
from mpq_compiler.support.decibels import sqnr

LEAST = {"Q2_K": 9, "Q3_K": 14, "Q4_0": 20, "Q4_1": 20, "Q5_0": 26, "Q5_1": 26, "Q6_K": 31, "Q8_0": 42}
"""What each type keeps of normal numbers, in dB."""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.type.name)
def test_blocks_decode_to_what_was_encoded(kind):
    weight = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    made = gguf.dequantize(encode(kind, weight, None), kind.type)
    assert made.shape == weight.shape
    assert sqnr(weight, made) > LEAST[kind.type.name]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("Q3_K", -4, 3), ("Q4_0", -8, 7), ("Q5_0", -16, 15), ("Q6_K", -32, 31), ("Q8_0", -127, 127)]
)
def test_a_grid_stays_exact(name, least, most):
    kind = next(k for k in KINDS if k.type.name == name)
    generator = np.random.default_rng(1)
    steps = generator.uniform(0.01, 0.1, 16).astype(np.float16).astype(np.float32)
    weight = generator.integers(least, most + 1, (16, 512)) * steps[:, None]
    assert np.array_equal(gguf.dequantize(encode(kind, weight, steps), kind.type), weight)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.type.name)
def test_zeros_and_constants(kind):
    zeros = np.zeros((2, 256), np.float32)
    assert np.array_equal(gguf.dequantize(encode(kind, zeros, None), kind.type), zeros)
    ones = np.ones((2, 256), np.float32)
    assert np.abs(gguf.dequantize(encode(kind, ones, None), kind.type) - ones).max() < 0.15
