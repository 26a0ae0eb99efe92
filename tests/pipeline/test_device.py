"""A GPU: what runs the model runs there, every operand of it, and the results are the CPU's but for orders of sums."""

from __future__ import annotations

import statistics

import pytest
import torch

from mpq_compiler.driver.check import check
from mpq_compiler.driver.options import Options
from mpq_compiler.ir import device
from mpq_compiler.ir.findings import ALLOCATION, SENSITIVITY
from mpq_compiler.ir.interpreter import run
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.support.errors import UserError
from tests.harness import pretend_device, programs

PIPELINE = (
    "trace,layout,equalize{rows=64},rotate{rows=64},calibrate,time-groups{groups=3},"
    "sensitivity{inputs=2,probes=2,formats=int2/int8},bit-allocation{weights=4.8%s}"
)


def test_the_pretended_device_is_one():
    x, index = torch.arange(6.0).reshape(2, 3), torch.tensor([1])
    with pretend_device.there() as name:
        there = x.to(name)
        assert there.device == torch.device(name) and torch.equal(there.cpu(), x)
        assert torch.equal((there @ there.T * 2)[index].cpu(), (x @ x.T * 2)[index])
        with pytest.raises(RuntimeError, match="two devices"):
            there + x
        leaf = torch.ones(2, 3).to(name).requires_grad_()
        (leaf * there).square().sum().backward()
        assert leaf.grad.device == there.device and torch.equal(leaf.grad.cpu(), 2 * x * x)


@pytest.mark.parametrize("model", programs.MODELS)
def test_a_program_runs_there(model):
    program, inputs = programs.after(model, "layout"), dict(programs.inputs(model, 2))
    expected = run(program, inputs)
    with pretend_device.there() as name:
        seen = []
        output = run(program, inputs, lambda node, value: seen.append(value), device=name)
    assert float((output - expected).norm() / expected.norm()) < 1e-5 and output.device.type == "cpu"
    assert {value.device for value in seen if isinstance(value, torch.Tensor)} == {pretend_device.DEVICE}


@pytest.mark.parametrize(("model", "options"), [("unet2d", ""), ("pixart", ",dynamic=true"), ("sd3", ",attention=8")])
def test_what_runs_the_model_runs_there(model, options, monkeypatch):
    """Rewrites, calibration, probes and the plan's noise; they find what the CPU finds."""

    def found(name: str):
        session = Session(programs.denoiser(model), programs.calibration(model), device=name)
        return manager.run_pipeline(parser.parse(PIPELINE % options), programs.empty(), session)[0]

    monkeypatch.setattr(Session, "map", lambda self, work, items: [work(item) for item in items])
    monkeypatch.setattr(Session, "tasks", _tasks)
    expected = found("cpu")
    with pretend_device.there() as name:
        program = found(name)
    assert {*program.weights} == {*expected.weights} and {*program.activations} == {*expected.activations}
    # the last bits of moments decide on losses (below), and those on which of two layers gets the wider format
    assert sum(program.weights[path] != plan for path, plan in expected.weights.items()) <= 2
    assert program.facts[ALLOCATION]["objective"] == pytest.approx(expected.facts[ALLOCATION]["objective"], rel=0.1)
    ours, theirs = (p.facts[SENSITIVITY] for p in (program, expected))
    for kind in ("weights", "activations", "attention"):
        assert {*ours[kind]} == {*theirs[kind]}
        losses = ((name, choice, loss) for name, found in theirs[kind].items() for choice, loss in found.items())
        ratios = [(ours[kind][name][choice] + 1e-12) / (loss + 1e-12) for name, choice, loss in losses]
        # of a row with two scales that are as good, the last bits of its moments decide on one
        assert all(0.7 < ratio < 1.4 for ratio in ratios)
        assert not ratios or statistics.median(ratios) == pytest.approx(1, rel=1e-3)
    one, other = (p.facts[ALLOCATION]["additivity"]["measured"] for p in (program, expected))
    assert one == pytest.approx(other, rel=0.1)
    ours, theirs = program.facts[CALIBRATION], expected.facts[CALIBRATION]
    torch.testing.assert_close(ours.outputs, theirs.outputs, rtol=1e-4, atol=1e-4)
    for edge, known in theirs.edges.items():
        torch.testing.assert_close(ours.edges[edge].values, known.values, rtol=1e-3, atol=1e-3)
    for layer, gram in theirs.grams.items():
        torch.testing.assert_close(ours.grams[layer], gram, rtol=1e-3, atol=1e-3)


def _tasks(self, task, shared, items, ended):
    """On this thread, where the device is."""
    results = []
    for item in items:
        results.append(task(shared, item))
        ended(item, results[-1])
    return results


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tpu", "device='tpu' is not known: it is 'cpu', 'cuda' or 'cuda:1'"),
        ("cuda:x", "device='cuda:x' is not known"),
        ("cuda:7", "device cuda:7: torch sees 2 GPUs here; leave it out to compile on the CPU"),
    ],
)
def test_a_device_that_is_not_there_is_a_sentence(name, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=sentence):
        check(Options(device=name))
    assert device.require("cuda") == "cuda:0" and device.require("cuda:1") == "cuda:1"


def test_without_a_gpu_and_with_a_cluster_it_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="device cuda: torch sees no GPU here"):
        check(Options(device="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="distributed runs on CPUs, and device cuda is a GPU here"):
        check(Options(device="cuda", distributed="ray"))
