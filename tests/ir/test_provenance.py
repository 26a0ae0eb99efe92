"""What the record of decisions keeps of numbers."""

from __future__ import annotations

import math

import torch

from mpq_compiler.ir.provenance import plain


def test_fractions_are_rounded_and_whole_numbers_stay() -> None:
    """A budget that is used to the last would else be exceeded in the record."""
    assert plain({"max": 1671424.0, "used": 1671424, "loss": 1 / 3, "none": [None, True, "int4"]}) == {
        "max": 1671424.0, "used": 1671424, "loss": 0.333333, "none": [None, True, "int4"]
    }  # fmt: skip
    assert plain(torch.tensor([0.5, 123456789.0], dtype=torch.float64)) == [0.5, 123456789.0]
    assert plain(math.inf) == math.inf
