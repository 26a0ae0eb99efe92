"""The bundled pipeline: from its name to a picture, in Python and by the C program, near what diffusers draws."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpq_compiler.api.compile import compile
from mpq_compiler.artifact import bundle
from mpq_compiler.driver import pipeline as pipelines
from mpq_compiler.frontend import checkpoint, pipeline_parts
from mpq_compiler.runtime import tokens_file
from mpq_compiler.runtime.pipeline import CompiledPipeline, load_pipeline
from mpq_compiler.sampling import loop
from tests.harness import once, packed

FOLDER = checkpoint.bundled_pipelines()["emoji"]
GUIDANCE, STEPS = 3.0, 10


@pytest.fixture
def compiled() -> CompiledPipeline:
    """The pipeline at 8 bits, with its C program."""

    def make(path: Path) -> None:
        options = {"recipe": "w8a8", "samples": 8, "steps": 10, "guidance": GUIDANCE}
        compile("emoji", path, emit="c", cache=packed.kernel_cache(), **options)

    return load_pipeline(once.made("emoji.mpq", make))


def test_its_files_are_small_and_of_tensors_alone() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors", ".txt"}
    assert sum(file.stat().st_size for file in files) < 12e6
    prompts = pipeline_parts.prompts(folder=FOLDER), pipeline_parts.prompts(unseen=True, folder=FOLDER)
    assert len(prompts[0]) == pipeline_parts.CALIBRATING and len(prompts[1]) >= 100
    assert not {*prompts[0]} & {*prompts[1]}


def test_it_draws_what_diffusers_draws(compiled: CompiledPipeline) -> None:
    assert compiled.guidance == GUIDANCE and compiled.size == (32, 32)
    source = pipelines.load("emoji")
    prompts = pipeline_parts.prompts(unseen=True, folder=FOLDER)[:6]
    noise = loop.gaussian(len(prompts), (4, 8, 8), 5)
    ours = compiled.decode(compiled.latents(prompts, steps=STEPS, noise=noise))
    for prompt, one, picture in zip(prompts, noise, ours, strict=True):
        drawn = pipeline_parts.drawn(source, "unet", prompt, one[None], STEPS, GUIDANCE, (32, 32))
        assert -10 * np.log10(np.square(drawn[0].transpose(1, 2, 0) - picture).mean()) > 24, prompt


def test_prompts_make_different_pictures(compiled: CompiledPipeline) -> None:
    """In one style a heart is red where it is told to be, and what is drawn hangs on the words."""
    prompts = [f"{colour} heart, twemoji" for colour in ("red", "blue", "green")]
    pixels = compiled(prompts, steps=STEPS, seed=1).pixels.reshape(3, -1, 3)
    inked = [each[each.min(1) < 0.5].mean(0) for each in pixels]
    assert [int(colour.argmax()) for colour in inked] == [0, 2, 1]


def test_the_c_program_draws_the_same(compiled: CompiledPipeline, tmp_path: Path) -> None:
    prompt = pipeline_parts.prompts(unseen=True, folder=FOLDER)[0]
    tokens_file.write(compiled.path, tmp_path / "ids", prompt, steps=STEPS, seed=3, images=2)
    command = [compiled.path / bundle.PROGRAM, "--tokens", tmp_path / "ids", "-o", tmp_path / "x.png"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    expected = np.concatenate([*map(np.asarray, compiled([prompt] * 2, steps=STEPS, seed=3).images)], axis=1)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), expected)
