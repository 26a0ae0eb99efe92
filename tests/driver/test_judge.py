"""What a compilation says of an artifact that differs from its packed program."""

from __future__ import annotations

import pytest

from mpq_compiler.driver.judge import AGREEMENT_DB, disagreement
from mpq_compiler.targets import table as targets

TARGET = targets.resolve("x86-64-avx2")


@pytest.mark.parametrize(
    ("difference", "error", "says"),
    [
        (None, None, None),
        (AGREEMENT_DB, 0.0, None),
        (-AGREEMENT_DB, None, None),
        (-0.32, 0.25, "-0.32 +- 0.25 dB from the packed program's, by 4 inputs: too few"),
        (-0.32, 0.05, "-0.32 dB from the packed program's: its kernels for 'x86-64-avx2' compute something else"),
        (0.32, None, "+0.32 dB from the packed program's: its kernels"),
    ],
)
def test_a_difference_is_the_kernels_where_it_is_not_that_of_few_inputs(difference, error, says):
    found = disagreement(difference, error, 4, TARGET)
    assert (found is None) if says is None else says in found
