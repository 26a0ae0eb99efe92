"""The C program of a pipeline draws the bits that Python draws, on every architecture, and refuses what is damaged."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mpq_compiler.artifact import bundle, pipeline
from mpq_compiler.driver.pipeline import KNOWN, compile_pipeline
from mpq_compiler.runtime import tokens_file
from mpq_compiler.runtime.pipeline import load_pipeline
from mpq_compiler.runtime.recording import Op
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from tests.harness import compiled_pipeline, once, packed, qemu, tiny_pipelines
from tests.harness.damage import ODD

PROMPT = "a red fox in the sea"
ARM = "aarch64-dotprod"


def drawn(folder: Path, tokens: Path, picture: Path, *options: str, emulated: bool = False) -> str:
    """What the program says; the picture is at `picture`, or it has failed."""
    command = [str(folder / bundle.PROGRAM), "--tokens", str(tokens), "-o", str(picture), *options]
    if emulated and platform.machine() != "aarch64":
        command = [*qemu.command("cortex-a76"), *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={"PATH": os.environ["PATH"]})
    assert done.returncode in (0, 1), done
    return done.stderr if done.returncode else done.stdout


def expected(folder: Path, images: int, **call: object) -> np.ndarray:
    found = load_pipeline(folder)([PROMPT] * images, **call).images
    return np.concatenate([np.asarray(image) for image in found], axis=1)


@pytest.mark.invariant("compiler-1")
@pytest.mark.parametrize("name", tiny_pipelines.FAMILIES)
def test_the_program_draws_the_bits_of_the_runtime(name: str, tmp_path: Path) -> None:
    """Contract (d) for whole pictures; neither threads nor another folder change a bit."""
    folder = compiled_pipeline.path(name)
    tokens_file.write(folder, tmp_path / "ids", PROMPT, steps=3, seed=2)
    said = drawn(folder, tmp_path / "ids", tmp_path / "a.png")
    assert all(f"{part}: " in said for part in pipeline.read(folder).hashes), said
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), expected(folder, 1, steps=3, seed=2))
    shutil.copy(folder / bundle.PROGRAM, tmp_path)
    drawn(tmp_path, tmp_path / "ids", tmp_path / "b.png", "--folder", str(folder), "--threads", "2")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_arm_draws_the_bits_of_x86(tmp_path: Path) -> None:
    if platform.machine() != "aarch64" and (absent := qemu.missing()):
        pytest.skip(absent)
    arm, own = compiled_pipeline.path(target=ARM), compiled_pipeline.path()
    said = {"steps": 3, "guidance": 3.0, "scheduler": "LCMScheduler"}
    for folder, name in ((arm, "arm"), (own, "own")):
        tokens_file.write(folder, tmp_path / name, PROMPT, "two ships", images=2, **said)
        drawn(folder, tmp_path / name, tmp_path / f"{name}.png", emulated=folder == arm)
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "arm.png")),
        expected(own, 2, negative_prompt="two ships", **said),
    )
    assert (tmp_path / "arm.png").read_bytes() == (tmp_path / "own.png").read_bytes()


@pytest.mark.parametrize("share", ["", ",share=0.9"], ids=["outputs", "inner"])
def test_steps_that_reuse_draw_the_bits_of_the_runtime(share: str, tmp_path: Path) -> None:
    """What steps sum, or take from earlier ones, is among the instructions, under guidance for both conditions."""
    said = {"steps": 4, "guidance": 3.0, "seed": 2}
    kept = f"keep-values{{every=2,steps=4,images=2,rounds=1{share}}}"
    folder, whole = compiled_pipeline.path(kept=kept), compiled_pipeline.path()
    reuse = bundle.read_manifest(folder / "unet")["reuse"]
    assert ("keeping" in reuse) == bool(share) and any(reuse["sources"])
    tokens_file.write(folder, tmp_path / "own", PROMPT, "two ships", **said)
    drawn(folder, tmp_path / "own", tmp_path / "own.png")
    picture = np.asarray(Image.open(tmp_path / "own.png"))
    np.testing.assert_array_equal(picture, expected(folder, 1, negative_prompt="two ships", **said))
    assert not np.array_equal(picture, expected(whole, 1, negative_prompt="two ships", **said))
    if not share or (platform.machine() != "aarch64" and qemu.missing()):
        return  # sums alone have no functions of their own
    arm = compiled_pipeline.path(target=ARM, kept=kept)
    tokens_file.write(arm, tmp_path / "arm", PROMPT, "two ships", **said)
    drawn(arm, tmp_path / "arm", tmp_path / "arm.png", emulated=True)
    assert (tmp_path / "arm.png").read_bytes() == (tmp_path / "own.png").read_bytes()


def test_what_it_refuses(tmp_path: Path) -> None:
    """A sentence and exit code 1; no picture is left."""
    folder, picture = compiled_pipeline.path(), tmp_path / "x.png"
    other = compiled_pipeline.path("sdxl")
    tokens_file.write(folder, tmp_path / "ids", PROMPT, steps=1)
    tokens_file.write(other, tmp_path / "others", PROMPT, steps=1)

    def refused(*arguments: object) -> str:
        command = [folder / bundle.PROGRAM, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and not picture.exists() and not [*tmp_path.glob(".x.png*")]
        return done.stderr

    good = ("--tokens", tmp_path / "ids", "-o", picture)
    assert "made for another pipeline than this one" in refused("--tokens", tmp_path / "others", "-o", picture)
    assert "cannot read" in refused("--tokens", tmp_path / "none", "-o", picture)
    assert "give the file of tokens and the picture" in refused("--tokens", tmp_path / "ids")
    assert "--threads is '0'; it must be a whole number from 1 to 1024" in refused(*good, "--threads", "0")
    assert "-o is given twice; give it once" in refused(*good, "--output", tmp_path / "y.png")
    assert "is a file that is read; name another" in refused("--tokens", tmp_path / "ids", "-o", tmp_path / "ids")
    assert "is not known: --colour" in refused(*good, "--colour", "red")
    assert "cannot read the weights" in refused(*good, "--folder", tmp_path)
    assert "cannot write" in refused("--tokens", tmp_path / "ids", "-o", tmp_path / "none" / "x.png")
    whole = (tmp_path / "ids").read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        assert "is not a sound safetensors file" in refused("--tokens", tmp_path / "cut", "-o", picture)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_of_tokens_ends_the_program_well(data: st.DataObject) -> None:
    """Any number of an instruction or of a buffer may be any other: refused, or drawn within bounds."""
    folder = compiled_pipeline.path()
    tokens = once.made("ids", lambda path: _tokens(folder, path))
    work = once.made("damaged", Path.mkdir)
    arrays = {name: value.copy() for name, value in tensorfile.load(tokens).items()}
    for _ in range(data.draw(st.integers(1, 3))):
        table = arrays[data.draw(st.sampled_from(["instructions", "buffers"]))]
        row, column = (data.draw(st.integers(0, size - 1)) for size in table.shape)
        table[row, column] = data.draw(st.sampled_from(ODD))
    damaged = work / f"{os.getpid()}"
    with damaged.open("wb") as stream:
        tensorfile.save(stream, arrays)
    drawn(folder, damaged, work / f"{os.getpid()}.png")


def _tokens(folder: Path, path: Path) -> None:
    tokens_file.write(folder, path, PROMPT, steps=1)


def test_instructions_are_few(tmp_path: Path) -> None:
    """A step is a handful of them, so what lies between calls costs next to nothing."""
    folder, rows = compiled_pipeline.path(), []
    for steps in (1, 2):
        rows.append(tokens_file.write(folder, tmp_path / str(steps), PROMPT, steps=steps)["instructions"])
    instructions = tensorfile.load(tmp_path / "2")["instructions"]
    assert (instructions[:, 0] == Op.CALL).sum() == 2 + 4 + 1
    assert rows[1] - rows[0] < 30
    four = tokens_file.write(folder, tmp_path / "3", PROMPT, steps=1, images=4)
    assert four["calls"] == 2 + 4 + 4  # one text for all of them


def test_equal_bytes_and_no_paths(tmp_path: Path) -> None:
    """The program too is a function of what is compiled alone; parts alone have none."""
    folder = compiled_pipeline.path()
    options = {"recipe": "w8a8", "samples": 2, "steps": 4, "emit": "c", "cache": packed.kernel_cache()}
    compile_pipeline(tiny_pipelines.pipeline("stable-diffusion"), tmp_path / "again.mpq", parts=KNOWN, **options)
    assert pipeline.read(folder).document == pipeline.read(tmp_path / "again.mpq").document
    program = (folder / bundle.PROGRAM).read_bytes()
    assert os.access(folder / bundle.PROGRAM, os.X_OK)
    assert str(tmp_path).encode() not in program and str(folder).encode() not in program and b"/mpq-" not in program
    source = tiny_pipelines.pipeline("stable-diffusion")
    compile_pipeline(source, tmp_path / "text.mpq", parts=["text"], **options)
    with pytest.raises(UserError, match="has no C program to draw with tokens: compile it with emit c"):
        tokens_file.write(tmp_path / "text.mpq", tmp_path / "ids", PROMPT)
    assert not (tmp_path / "ids").exists()
