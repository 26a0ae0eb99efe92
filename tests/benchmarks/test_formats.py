"""The benchmark of formats: what is held against entropy-coded weights."""

from __future__ import annotations

import pytest

from benchmarks import formats
from mpq_compiler.quantization.fitting import Rounding


def test_mixtures_of_formats_lie_between_the_best_of_them():
    points = [(2.0, 20.0), (2.2, 19.0), (3.0, 30.0), (4.0, 33.0)]
    assert formats.mixture(points, 2.5) == pytest.approx(25)
    assert formats.mixture(points, 3.5) == pytest.approx(31.5)
    assert formats.mixture(points, 2.0) == 20 and formats.mixture(points, 9.0) == 33
    assert formats.mixture(points[:2], 2.2) == 20  # with less than it may take
    assert formats.mixture([*points, (2.4, 29.0)], 2.5) == pytest.approx(29.25)


def test_what_is_claimed_of_layers():
    def row(name: str, bits: float, gptq: float, searched: float) -> dict[str, object]:
        found = {Rounding.GPTQ: gptq, Rounding.GPTQ_SCALES: searched, Rounding.GPTQ_PATHS: searched + 1}
        return {"model": "one", "format": name, "bits": bits, "layers": 7, **found}

    rows = [row("int2", 2.0, 18, 19), row("int3", 3.0, 26, 27), row("ec3", 3.0, 40, 40)]
    assert formats.claim(rows, "one") is None
    said = formats.claim([*rows, row(formats.CLAIMED, 2.25, 24, 24)], "one")
    assert said is not None and "24.0 dB, +4.0 to 20.0," in said and "24.0 dB, +3.0 to 21.0," in said
    assert said.endswith("25.0 dB, +3.0 to 22.0")
    assert formats.claim(rows, "another") is None
