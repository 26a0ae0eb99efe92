"""Denoisers whose inputs no table knows, each compiled by a call: films, sounds, packed tokens and lists of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mpq_compiler
from mpq_compiler.cli import mpqc
from mpq_compiler.driver.judge import AGREEMENT_DB
from mpq_compiler.ir.interpreter import run
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from tests.harness import programs, tiny_calls

SAID = {"never executed, and left out of the artifact", "data is permuted between two kernels"}
"""What is said of the text's half of a last block, of which only the image's is returned, and of films."""

FAMILIES = pytest.mark.parametrize("family", tiny_calls.CONFIGS)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a result, whatever its structure."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in tensors(part)]


def decibels(expected: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


@FAMILIES
def test_traces_and_lays_out_for_any_batch(family: str, tmp_path: Path) -> None:
    model = tiny_calls.denoiser(family, tmp_path)
    program, _ = manager.run_pipeline(parser.parse("trace,layout"), programs.empty(), Session(model))
    for batch in (1, 3):
        inputs = model.random_inputs(batch, 7)
        expected = model(**inputs)
        assert float((run(program, inputs) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert set(program.fallbacks.values()) <= SAID


@FAMILIES
def test_called_as_its_model_is(family: str, tmp_path: Path) -> None:
    """Contract (c), executed on this CPU, and what comes back has the model's own structure."""
    model = tiny_calls.model(family)
    examples = [tiny_calls.call(family, seed=seed) for seed in range(4)]  # by fewer, SQNRs are known to 0.06 dB only
    report = mpq_compiler.compile(model, tmp_path / "x.mpq", example=examples, recipe="w8a8", jobs=2)
    assert report.quality["executed_by"] == "artifact"
    assert abs(report.quality["agreement_db"]) <= AGREEMENT_DB
    compiled = mpq_compiler.load(tmp_path / "x.mpq")
    given = tiny_calls.call(family, batch=3, seed=5)
    with torch.no_grad():
        expected = model(**given, return_dict=False)
    found = compiled(**given, return_dict=False)
    assert [t.shape for t in tensors(found)] == [t.shape for t in tensors(expected)]
    for one, other in zip(tensors(expected), tensors(found), strict=True):
        assert decibels(one, other) > 20


# --- what was wrong at first: each ended in an internal error, or was refused --------------------------------------


def saved(family: str, folder: Path, model: torch.nn.Module | None = None) -> str:
    (model or tiny_calls.model(family)).save_pretrained(folder / family)
    return str(folder / family)


def command(folder: str, output: Path, *more: str) -> int:
    return mpqc.main(["compile", folder, "-o", str(output), "--recipe", "w8a8", "--target", "reference", *more])


@pytest.mark.parametrize(
    ("family", "said"),
    [
        (
            "sana-video",
            "SanaVideoTransformer3DModel denoises no images, for it convolves over one axis or three: give ",
        ),
        ("unet1d", "UNet1DModel denoises no images, for it convolves over one axis or three: give recorded calls"),
        ("ncsnpp", "of other times than those of DDIM compiles by recorded calls"),  # logarithms of noise levels
        ("flux2", "takes the input"),
    ],
)
def test_without_a_call_a_sentence_says_what_to_give(
    family: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(saved(family, tmp_path), tmp_path / "x.mpq") == 1
    error = capsys.readouterr().err
    assert said in error and "internal error" not in error


def test_what_a_model_never_reads_may_be_uninitialised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lumina-Next's padding token is left as it was found in memory, by diffusers."""
    model, file = tiny_calls.model("lumina-next"), tmp_path / "calls.safetensors"
    with mpq_compiler.record_inputs(model, file), torch.no_grad():
        for seed in range(16):
            model(**tiny_calls.call("lumina-next", seed=seed))
    model.pad_token.data.fill_(float("nan"))
    folder = saved("lumina-next", tmp_path, model)
    assert command(folder, tmp_path / "x.mpq", "--calibration", str(file)) == 0
    given = tiny_calls.call("lumina-next", 3, 9)
    with torch.no_grad():
        expected = model(**given).sample
    assert decibels(expected, mpq_compiler.load(tmp_path / "x.mpq")(**given).sample) > 20
    model.norm_out.linear_1.bias.data[0] = float("inf")
    model.save_pretrained(folder)
    assert command(folder, tmp_path / "y.mpq", "--calibration", str(file)) == 1
    assert "'norm_out.linear_1.bias'" in capsys.readouterr().err


def test_latents_of_one_channel_in_each_token(tmp_path: Path) -> None:
    """FLUX.2 with four channels: its latents have the shape of their transpose."""
    model = tiny_calls.model("flux2", in_channels=4)
    given = {**tiny_calls.call("flux2"), "hidden_states": torch.randn(2, 16, 4)}
    mpq_compiler.compile(model, tmp_path / "x.mpq", example=given, recipe="w8a8", target="reference")
    with torch.no_grad():
        expected = model(**given).sample
    assert decibels(expected, mpq_compiler.load(tmp_path / "x.mpq")(**given).sample) > 20
