"""Calls of diffusers' pipelines, translated to the compiler's inputs and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mpq_compiler.frontend import calibration_file, record
from mpq_compiler.frontend.input_specs import convention_of
from mpq_compiler.sampling.convention import Convention
from tests.harness import families, tiny

FLUX = Convention(patch=2, timestep_unit=1000.0, baked=("img_ids", "txt_ids"))


@pytest.mark.parametrize("array", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
def test_latents_are_packed_as_flux_packs_them(array):
    image = np.random.default_rng(0).standard_normal((2, 3, 6, 8), dtype=np.float32)
    tokens = FLUX.pack(array(image))
    expected = torch.nn.functional.unfold(torch.from_numpy(image), 2, stride=2).transpose(1, 2)
    assert isinstance(tokens, type(array(image))) and np.array_equal(tokens, expected)
    assert np.array_equal(FLUX.unpack(tokens, 6, 8), image)
    assert Convention().pack(image) is image and Convention().unpack(image, 6, 8) is image


def test_what_differs_is_found_by_the_parameters_of_the_model():
    found = {name: convention_of(tiny.model(name)) for name in tiny.ALL_FAMILIES}
    assert found.pop("flux") == FLUX
    assert found.pop("hunyuan") == Convention(baked=("image_rotary_emb",))
    assert set(found.values()) == {Convention()}


@pytest.mark.parametrize("name", tiny.ALL_FAMILIES)
def test_recorded_calls_are_the_inputs_of_the_compiler(name: str, tmp_path: Path):
    """A model called as its pipeline does: what is recorded is what the denoiser takes, in its types and shapes."""
    model, given = tiny.model(name), tiny.inputs(name, batch=3)
    with record.record_inputs(model, tmp_path / "calls"):
        tiny.call(name, model, given)
    recorded = load_file(tmp_path / "calls")
    assert recorded.keys() == given.keys()
    for key, value in given.items():
        torch.testing.assert_close(recorded[key], value, msg=key)
    loaded = calibration_file.load(families.denoiser(name), tmp_path / "calls")
    assert loaded.keys() == given.keys()
