"""What a compilation says of an artifact that differs from its packed program."""

from __future__ import annotations

import pytest
import torch

from mpq_compiler.driver.judge import AGREEMENT_DB, disagreement, disagreements
from mpq_compiler.ir.program import TensorStore
from mpq_compiler.ir.specialization import Specialization, size_text
from mpq_compiler.pipeline.backend import BuildRequest, backend_of
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.targets import table as targets
from tests.harness import packed

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


def test_an_artifact_of_another_program_is_found_at_every_size(tmp_path):
    """The packed program gets other codes than the artifact has, as if a kernel read its weights wrong."""
    row, case = targets.resolve("reference"), packed.program("unet2d")
    built = backend_of(row).build(case.program, row, BuildRequest((1, 2)))
    artifact = compiled_denoiser.load(packed.write(tmp_path / "a.mpq", case.program, row, built))
    assert not [*disagreements(artifact, row, case.denoiser, [Specialization(case.program, (1,))])]
    name, tensors = "up_blocks.1.resnets.1.conv2.weight:codes", dict(case.program.tensors)
    tensors[name] = torch.zeros_like(tensors[name])
    other = case.program.fork(tensors=TensorStore(tensors))
    (note,) = disagreements(artifact, row, case.denoiser, [Specialization(other, (1,))])
    assert note.startswith(f"at {size_text(case.program)}: the artifact's SQNR is +")
    assert "its kernels for 'reference' compute something else" in note
