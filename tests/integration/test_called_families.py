"""Denoisers whose inputs no table knows, each compiled by a call: films, sounds, packed tokens and lists of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mpq_compiler
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
    report = mpq_compiler.compile(model, tmp_path / "x.mpq", example=tiny_calls.call(family), recipe="w8a8", jobs=2)
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
