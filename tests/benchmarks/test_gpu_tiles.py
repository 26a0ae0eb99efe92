"""The model by which tiles are chosen, against the times that it stands on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("tvm")
from benchmarks import gpu_tiles
from mpq_compiler.backends.tvm.kernels.cuda import wgmma
from mpq_compiler.backends.tvm.kernels.cuda.gemm import model


@pytest.fixture(scope="module")
def results():
    return json.loads(gpu_tiles.RESULTS.read_text())


def test_its_factors_are_those_of_the_times(results):
    for factor, value in gpu_tiles.fit(results).items():
        assert getattr(model, factor) == pytest.approx(value, rel=0.01), factor


def test_what_it_chooses_is_the_best_or_nearly(results):
    judged = gpu_tiles.judged(results["us"])
    assert len(judged) == len(gpu_tiles.LAYERS) and max(judged.values()) < 1.05


def test_tiles_that_fit():
    """Each layer's rows and columns; sums of rows' codes need a thread for each row."""
    for layer in gpu_tiles.LAYERS:
        for bits in (8, 4):
            tile = wgmma.tile(layer.problem(bits))
            assert layer.outputs % tile.columns == 0 and tile.threads == 2 * tile.columns
            assert model.room(tile) >= 2
    offset = gpu_tiles.LAYERS[8].problem(8)
    assert wgmma.tile(offset).rows == 160
    own = wgmma.tile(replace(offset, has_offset=True))
    assert own.rows <= own.threads == 128
