"""Integer convolution kernels, bit for bit against the definition, on every CPU target."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from tests.harness.integer_kernels import AARCH64, X86, Kernels, assert_same_bits, needs
from tests.harness.shapes import CONVOLUTIONS, FORMATS, Case, make_case, reference, seed


def two_segments(problem: QuantMatmul) -> QuantMatmul:
    """The problem with its channels in two unequal segments."""
    first = problem.channels // 3 or 1
    return replace(problem, segments=(first, problem.channels - first))


@functools.cache
def cases() -> list[tuple[Case, np.ndarray]]:
    """Each convolution of the list in two formats, some in two segments; zero points 0, 255 and drawn."""
    result, names = [], list(FORMATS)
    for i, (name, (batch, problem)) in enumerate(CONVOLUTIONS.items()):
        for turn in range(2):
            variant = replace(problem, **FORMATS[names[(2 * i + 3 * turn) % len(names)]])
            if problem.channels > 1 and (i + turn) % 2:
                variant = two_segments(variant)
            case = make_case(variant, batch, seed(name, turn), ((0,), (255,), (0, 255), ())[(i + turn) % 4])
            result.append((case, reference(case)))
    return result


@pytest.mark.parametrize("name", [*X86, *AARCH64])
def test_convolutions(name):
    isa, table = needs(name), cases()
    if name not in ("x86-64-avx512vnni", "x86-64-avx2"):
        table = table[1::3]
    kernels = Kernels(isa, [case.problem for case, _ in table])
    results = kernels.run([(i, case) for i, (case, _) in enumerate(table)])
    for (case, want), got in zip(table, results, strict=True):
        assert_same_bits(got, want, (case.batch, case.problem))


@pytest.mark.parametrize("name", ["x86-64-avx512vnni", "x86-64-avx2"])
def test_images_in_bands_and_batches_in_chunks(name):
    """An image beyond the cache is computed in bands of rows, small ones many to a chunk: the same results."""
    large = QuantMatmul(61, 47, 192, 20, (3, 3), (2, 1), (1, 1, 1, 1), bits=4, groups=2)
    small = QuantMatmul(3, 3, 24, 20, (3, 3), padding=(1, 1, 1, 1), bits=2, groups=2)
    calls = [(0, make_case(large, 2, 1)), (1, make_case(small, 131, 2))]
    for (_, case), got in zip(calls, Kernels(needs(name), [large, small]).run(calls), strict=True):
        assert_same_bits(got, reference(case), case.problem)
