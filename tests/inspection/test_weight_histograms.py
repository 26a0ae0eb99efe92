"""Histograms show the values and levels that the weights of an artifact have."""

from __future__ import annotations

import itertools

import pytest
import torch

from mpq_compiler.formats.contract import WeightTables
from mpq_compiler.inspection import weight_histograms


def test_values_are_counted_and_levels_are_those_of_a_row():
    codes = torch.tensor([[0, 1, 2, 3], [3, 3, 3, 0], [1, 1, 2, 2]], dtype=torch.uint8)
    lut = torch.tensor([[-8, -1, 1, 8]], dtype=torch.int8)
    scale = torch.tensor([[0.5], [1.0], [0.25]], dtype=torch.float16)
    found = weight_histograms.histogram(codes, WeightTables(scale, None, lut))
    assert found["ends"] == [-8, 8] and found["levels"] == [-4, -0.5, 0.5, 4]
    edges = torch.linspace(-8, 8, weight_histograms.BINS + 1)
    values = sorted([-4, -0.5, 0.5, 4, 8, 8, 8, -8, -0.25, -0.25, 0.25, 0.25])
    assert [bool(count) for count in found["counts"]] == [
        any(low <= v < high or v == high == 8 for v in values) for low, high in itertools.pairwise(edges)
    ]
    assert sum(found["counts"]) == len(values)


@pytest.mark.parametrize("offset", [None, torch.tensor([0.5, 0.0], dtype=torch.float16)])
def test_codes_that_are_values_have_the_levels_in_use(offset):
    codes = torch.tensor([[-127, 5, 5], [0, 0, 0]], dtype=torch.int8)
    scale = torch.tensor([[1.0], [0.5]], dtype=torch.float16)
    found = weight_histograms.histogram(codes, WeightTables(scale, offset))
    assert found["levels"] == ([-127, 5] if offset is None else [-126.5, 5.5])
    assert found["ends"] == [found["levels"][0], -found["levels"][0]]
