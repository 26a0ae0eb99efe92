"""Histograms show the values and levels that the weights of an artifact have."""

from __future__ import annotations

import itertools

import pytest
import torch

import mpq_compiler
from mpq_compiler.artifact import bundle
from mpq_compiler.formats.contract import WeightTables
from mpq_compiler.frontend import checkpoint
from mpq_compiler.inspection import explorer, weight_histograms
from mpq_compiler.support.errors import UserError
from tests.harness import tiny


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


def test_the_float_weight_is_counted_in_the_same_bins():
    codes, scale = torch.tensor([[-1, 0, 1, 1]], dtype=torch.int8), torch.tensor([[1.0]], dtype=torch.float16)
    found = weight_histograms.histogram(codes, WeightTables(scale), torch.tensor([[-2.0, 0.1, 0.9, 2.0]]))
    assert found["ends"] == [-2, 2]  # the widest of both
    assert sum(found["counts"]) == sum(found["float"]) == 4
    assert found["float"][0] == found["float"][-1] == 1 and found["counts"][0] == 0


def test_float_weights_are_those_of_the_channels_that_passes_rewrote(tmp_path, monkeypatch):
    """Nearly all values of 8 bits lie in the bins of the float weight's, which those of the bare model do not."""
    model, output = tiny.save("dit", tmp_path), tmp_path / "a.mpq"
    head = "trace,layout,equalize{rule=smoothquant},rotate{rule=everywhere},calibrate,time-groups"
    pipeline = f"{head},bit-allocation{{uniform=int8}},insert-fake-quant,round-weights,fold-fake-quant,fuse-epilogues"
    mpq_compiler.compile(model, output, target="reference", pipeline=pipeline, samples=2, steps=3)
    artifact = bundle.read(output)
    kinds = {step["kind"] for entry in artifact.manifest["rewrites"] for step in entry["steps"]}
    assert {"inputs", "rotate"} <= kinds

    def apart(histogram) -> float:
        pairs = zip(histogram["counts"], histogram["float"], strict=True)
        return sum(abs(a - b) for a, b in pairs) / (2 * sum(histogram["counts"]))

    def farthest() -> float:
        drawn = [layer["histogram"] for layer in explorer.gather(output, model=str(model))["layers"]]
        assert len(drawn) > 5
        return max(apart(histogram) for histogram in drawn)

    assert farthest() < 0.1
    weights = checkpoint.read_weights(model / "transformer")
    segments = {step["parameter"]: (64,) for step in artifact.manifest["rewrites"]}
    wider = {name: torch.cat([value, value], 1) if value.dim() > 1 else value for name, value in weights.items()}
    with pytest.raises(UserError, match=r"was made of another model: its '.*' has another shape"):
        weight_histograms.histograms(artifact, segments, wider)
    monkeypatch.setattr(weight_histograms, "bases", lambda *_: {})
    assert farthest() > 0.2
