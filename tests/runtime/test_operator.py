"""Denoisers in graphs of torch's: one operator, whose results have the bits of a call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensorMode

from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.runtime.instances import INSTANCES

pytest.importorskip("tvm")
from tests.harness import relax_artifact


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "tiny.mpq"
    relax_artifact.build(path)
    return compiled_denoiser.load(path, threads=1)


def inputs(batch: int) -> dict[str, torch.Tensor]:
    """Eighths, so that every product and sum is exact."""
    draw = np.random.default_rng(0)
    return {
        "sample": torch.from_numpy(draw.integers(-64, 64, (batch, 3, 16)).astype(np.float32) / 8),
        "timestep": torch.from_numpy(draw.integers(0, 1000, batch)),
        "class_labels": torch.from_numpy(draw.integers(0, 10, batch)),
    }


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_step_is_one_graph(denoiser, backend):
    """Without a break, the call among what is computed before and behind it."""

    @torch.compile(fullgraph=True, backend=backend)
    def step(given, scale):
        found = denoiser(**{**given, "sample": given["sample"] * scale}, return_dict=False)[0]
        return found + 1, denoiser(**given).sample

    given = inputs(3)
    first, second = step(given, torch.tensor(2.0))
    doubled = denoiser(**{**given, "sample": given["sample"] * 2}, return_dict=False)[0]
    assert torch.equal(first, doubled + 1)
    assert torch.equal(second, denoiser(**given, return_dict=False)[0])


def test_the_denoiser_itself_is_compiled(denoiser):
    compiled, given = torch.compile(denoiser, fullgraph=True, backend="aot_eager"), inputs(2)
    expected = denoiser(**given, return_dict=False)[0]
    assert torch.equal(compiled(**given, return_dict=False)[0], expected)
    sample, timestep, labels = given.values()
    assert torch.equal(compiled(sample, timestep, labels, return_dict=False)[0], expected)
    one = denoiser(sample, 7, labels, return_dict=False)[0]
    assert torch.equal(compiled(sample, 7, labels, return_dict=False)[0], one)


def test_half_precision(denoiser):
    given = inputs(2)
    given["sample"] = given["sample"].bfloat16()
    found = torch.compile(denoiser, fullgraph=True, backend="aot_eager")(**given, return_dict=False)[0]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, denoiser(**given, return_dict=False)[0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_result_is_known_without_a_call(denoiser, device):
    """On a device that is not there, in the type of the latents."""
    from mpq_compiler.runtime import operator  # noqa: F401  # registers it

    with FakeTensorMode():
        for dtype, expected in ((torch.float32, torch.float32), (torch.float16, torch.float16)):
            tensors = [torch.empty(5, 3, 16, dtype=dtype, device=device), torch.empty(5, device=device)]
            found = torch.ops.mpq_compiler.predict(denoiser._number, "sample,timestep", tensors, [])
            assert (found.shape, found.dtype, found.device.type) == ((5, 3, 16), expected, device)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sample": torch.zeros(1, 5, 17)}, r"takes no latents of shape \[1, 5, 17\]: compile for it"),
        ({"class_labels": [1]}, "argument 'class_labels' is a list: torch.compile takes tensors and numbers"),
    ],
)
def test_what_no_graph_takes(denoiser, change, says):
    with pytest.raises(TorchDynamoException, match=says):
        torch.compile(denoiser, fullgraph=True, backend="aot_eager")(**{**inputs(1), **change}, return_dict=False)


def test_a_graph_keeps_no_denoiser(tmp_path):
    path = tmp_path / "tiny.mpq"
    relax_artifact.build(path)
    denoiser = compiled_denoiser.load(path, threads=1)
    number = denoiser._number
    assert INSTANCES[number] is denoiser
    del denoiser
    assert number not in INSTANCES
